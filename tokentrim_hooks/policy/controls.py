"""Control policies: what an effect of pruning has to beat.

They wrap any policy, keep its trigger and its severities, and change one thing: which tokens die, or the noise that the
chunk is generated from again. Random numbers come from generators of their own, so the global stream, and with it the
noise of every later chunk, stays that of the other arms.

"Regenerate, prune nothing" needs a word. A denoiser call is deterministic: replayed on an unpruned context it gives the
same bits (``ChooseTokens(policy, "none")`` shows that, and is a check of the plumbing). What a real retry without
pruning does, another draw, is ``FreshNoise(ChooseTokens(policy, "none"))``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.commit_window import CommitWindow
from tokentrim_hooks.policy.flowmo import FlowMo
from tokentrim_hooks.policy.frame_eviction import FrameEviction
from tokentrim_hooks.policy.soft_prune import SoftPrune
from tokentrim_hooks.policy.token_trim import DriftPolicy, measured
from tokentrim_hooks.policy.views import Chunk, ContextView, History, Noisy, Place, Verdict

Choice = Literal["random", "least", "none"]


@dataclass(frozen=True)
class AlwaysPolicy(DriftPolicy):
    """Prune the most drifting tokens of every chunk after the warm-up; ``sensitivity`` is ignored."""

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """Flag every sample, with a threshold of -inf."""
        verdict = measured(chunk.drift, history, self.fraction, self.sensitivity)
        ready = history.count >= max(self.warmup, 1)
        return replace(
            verdict,
            threshold=torch.full_like(verdict.severity, -math.inf),
            prune=torch.full_like(verdict.prune, ready),
        )


@dataclass(frozen=True)
class Wrapper(Policy):
    """A policy around ``policy``: it judges, regenerates, persists and spares anchors as that one does.

    Raises:
        ValueError: one of :class:`Policy`'s options is given here; it belongs to the wrapped policy.
    """

    policy: Policy = field(default_factory=DriftPolicy)

    def __post_init__(self) -> None:
        for name, default in Policy().settings().items():
            if getattr(self, name) not in (default, getattr(self.policy, name)):
                raise ValueError(f"{name} is an option of the wrapped policy: give it to {type(self.policy).__name__}")
            object.__setattr__(self, name, getattr(self.policy, name))
        super().__post_init__()

    def judge(self, chunk: Chunk, history: History) -> Verdict | None:
        """The wrapped policy's verdict."""
        return self.policy.judge(chunk, history)

    @property
    def regenerates(self) -> bool:
        """Whether the wrapped policy does."""
        return self.policy.regenerates

    @property
    def recalls(self) -> int:
        """As many severities as the wrapped policy asks for."""
        return self.policy.recalls

    def redraw(self, latents: Tensor, start: int) -> Tensor | None:
        """The wrapped policy's noise."""
        return self.policy.redraw(latents, start)

    def settings(self) -> dict[str, Any]:
        """Our own options and the wrapped policy's, flat; ``policy`` is the name of the policy inside."""
        return {**self.policy.settings(), **super().settings(), "policy": type(self.policy).__name__}


@dataclass(frozen=True)
class ChooseTokens(Wrapper):
    """When the wrapped policy triggers, prune as many other tokens: random ones, the least drifting ones, or none.

    Args:
        choice: which tokens die.
        seed: of the random choice, which differs by sample and by chunk.
    """

    choice: Choice = "random"
    seed: int = 0

    def judge(self, chunk: Chunk, history: History) -> Verdict | None:
        """The wrapped policy's verdict with its tokens exchanged; severity and threshold stay."""
        verdict = self.policy.judge(chunk, history)
        if verdict is None:
            return None
        return replace(verdict, tokens=self._tokens(chunk.drift, verdict.tokens.shape[1], chunk.index))

    def _tokens(self, drift: Tensor, count: int, index: int) -> Tensor:
        if self.choice == "none":
            return torch.empty(drift.shape[0], 0, dtype=torch.long, device=drift.device)
        if self.choice == "least":
            return drift.argsort(dim=-1)[:, :count]
        rng = torch.Generator(drift.device).manual_seed(_mixed(self.seed, index))
        return torch.rand(drift.shape, generator=rng, device=drift.device).argsort(dim=-1)[:, :count]


@dataclass(frozen=True)
class FreshNoise(Wrapper):
    """Regenerate from newly drawn noise; triggers and tokens are the wrapped policy's.

    For samplers whose first call starts from pure noise of unit variance and that go on from the predicted x0 alone
    (Self-Forcing and its kin). A sampler that integrates its own latents would mix two draws.

    Args:
        seed: of the noise, which differs by chunk.
    """

    seed: int = 0

    def redraw(self, latents: Tensor, start: int) -> Tensor:
        """Noise like ``latents`` for the chunk at latent frame ``start``, the same in every repetition."""
        rng = torch.Generator(latents.device).manual_seed(_mixed(self.seed, start))
        return torch.randn(latents.shape, generator=rng, device=latents.device, dtype=latents.dtype)


@dataclass(frozen=True)
class OldestWindow(CommitWindow):
    """Control for :class:`CommitWindow`: the commit reads as many frames of the context, but the oldest ones."""

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """Hide all frames but the oldest ones from a commit."""
        if chunk.phase != "commit":
            return None
        anchors = torch.tensor(context.anchors, dtype=torch.bool)
        hidden = (~anchors).cumsum(0) > max(self.frames - chunk.frames, 0)
        return torch.where(anchors, torch.tensor(not self.anchors), hidden)


@dataclass(frozen=True)
class NewestLight(SoftPrune):
    """Control for :class:`SoftPrune`: as many frames weigh less, but the newest ones."""

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """The weight of each frame, ``[frames]``."""
        weights = super().hide(chunk, context)
        if weights is None:
            return None
        others = ~torch.tensor(context.anchors, dtype=torch.bool)
        weights[others] = weights[others].flip(0)
        return weights


@dataclass(frozen=True)
class RandomFrames(FrameEviction):
    """Control for :class:`FrameEviction`: as many frames are not read, but random ones of those that could be.

    Args:
        seed: of the choice, which differs by chunk and is the same in all of its calls.
    """

    seed: int = 0

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """The flags of each sample, dealt out anew among the frames behind the anchors and before the newest."""
        hidden = super().hide(chunk, context)
        if hidden is None:
            return None
        rng = torch.Generator().manual_seed(_mixed(self.seed, chunk.start))
        free = torch.arange(context.frames) < max(context.frames - self.keep, 0)
        if not self.prune_anchors:
            free &= ~torch.tensor(context.anchors, dtype=torch.bool)
        places = free.nonzero()[:, 0].to(hidden.device)
        dealt = places[torch.randperm(len(places), generator=rng).to(hidden.device)]
        return hidden.clone().index_copy(1, places, hidden[:, dealt])


@dataclass(frozen=True)
class RandomStep(FlowMo):
    """Control for :class:`FlowMo`: every element of the first chunk's latents moves as far, but up or down at random.

    Args:
        seed: of the direction.
    """

    seed: int = 0

    def _slope(self, latents: Tensor, chunk: Noisy, level: float) -> Tensor:
        rng = torch.Generator(latents.device).manual_seed(self.seed)
        return torch.randn(latents.shape, generator=rng, device=latents.device, dtype=latents.dtype)


def _mixed(seed: int, place: int) -> int:
    """One seed from two numbers; distinct for all places below a million."""
    return (seed * 1_000_003 + place) % 2**63
