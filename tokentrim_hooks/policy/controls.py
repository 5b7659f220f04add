"""Control policies: what an effect of pruning must be told from.

They wrap any policy, keep its trigger and its severities, and change one thing: which tokens die, or the noise that the
chunk is generated from again. Random numbers come from generators of their own, so the global stream, and with it the
noise of every later chunk, stays that of the other arms.

"Regenerate, prune nothing" needs a word. A denoiser call is deterministic: replayed on an unpruned context it gives the
same bits (``ChooseTokens(policy, "none")`` shows that, and is a check of the plumbing). What a real retry without
pruning does, another draw, is ``FreshNoise(ChooseTokens(policy, "none"))``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import History, Policy, Verdict
from tokentrim_hooks.policy.drift import severity_of, unstable_tokens
from tokentrim_hooks.policy.token_trim import DriftPolicy

Choice = Literal["random", "least", "none"]


@dataclass(frozen=True)
class AlwaysPolicy(DriftPolicy):
    """Prunes the most drifting tokens of every chunk after the warm-up; ``sensitivity`` is ignored."""

    def judge(self, drift: Tensor, history: History) -> Verdict:
        """Flag every sample, with a threshold of -inf."""
        tokens = unstable_tokens(drift, self.fraction)
        severity = severity_of(drift, tokens)
        prune = torch.full_like(severity, history.count >= max(self.warmup, 1), dtype=torch.bool)
        return Verdict(tokens, severity, torch.full_like(severity, -math.inf), prune)


@dataclass(frozen=True)
class Wrapper:
    """A policy around ``policy`` that answers the optional questions (see :class:`Policy`) as that one does."""

    policy: Policy

    @property
    def max_regenerations(self) -> int:
        """As the wrapped policy's."""
        return int(getattr(self.policy, "max_regenerations", 1))

    @property
    def persist(self) -> bool:
        """As the wrapped policy's."""
        return bool(getattr(self.policy, "persist", True))

    @property
    def prune_anchors(self) -> bool:
        """As the wrapped policy's."""
        return bool(getattr(self.policy, "prune_anchors", False))

    @property
    def coarse(self) -> str:
        """As the wrapped policy's."""
        return str(getattr(self.policy, "coarse", "any"))


@dataclass(frozen=True)
class ChooseTokens(Wrapper):
    """When the wrapped policy triggers, prune as many other tokens: random ones, the least drifting ones, or none.

    ``seed`` is of the random choice, which differs by sample and by chunk.
    """

    choice: Choice = "random"
    seed: int = 0

    def judge(self, drift: Tensor, history: History) -> Verdict:
        """The wrapped policy's verdict with its tokens exchanged; severity and threshold stay."""
        verdict = self.policy.judge(drift, history)
        return replace(verdict, tokens=self._tokens(drift, verdict.tokens.shape[1], history.chunk))

    def _tokens(self, drift: Tensor, count: int, chunk: int) -> Tensor:
        if self.choice == "none":
            return torch.empty(drift.shape[0], 0, dtype=torch.long, device=drift.device)
        if self.choice == "least":
            return drift.argsort(dim=-1)[:, :count]
        rng = torch.Generator(drift.device).manual_seed(_mixed(self.seed, chunk))
        return torch.rand(drift.shape, generator=rng, device=drift.device).argsort(dim=-1)[:, :count]


@dataclass(frozen=True)
class FreshNoise(Wrapper):
    """Regenerate from newly drawn noise; triggers and tokens are the wrapped policy's.

    For samplers whose first call starts from pure noise of unit variance and that go on from the predicted x0 alone
    (Self-Forcing and its kin). A sampler that integrates its own latents would mix two draws.
    """

    seed: int = 0

    def judge(self, drift: Tensor, history: History) -> Verdict:
        """The wrapped policy's verdict."""
        return self.policy.judge(drift, history)

    def redraw(self, latents: Tensor, start: int) -> Tensor:
        """Noise like ``latents`` for the chunk at latent frame ``start``, the same in every repetition."""
        rng = torch.Generator(latents.device).manual_seed(_mixed(self.seed, start))
        return torch.randn(latents.shape, generator=rng, device=latents.device, dtype=latents.dtype)


def _mixed(seed: int, place: int) -> int:
    """One seed from two numbers; distinct for all places below a million."""
    return (seed * 1_000_003 + place) % 2**63
