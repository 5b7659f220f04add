"""The heart of Algorithm 1: judge a chunk, prune its context, call the denoiser again."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tokentrim_hooks.adapter import Adapter, Call
from tokentrim_hooks.errors import LatentsError, TokenTrimWarning
from tokentrim_hooks.policy.base import Policy, Verdict
from tokentrim_hooks.policy.drift import latent_summary, token_drift
from tokentrim_hooks.pruning.tap import enter_tap, leave_tap
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.reading import Reading, read
from tokentrim_hooks.rollout.state import Chunk, Step, Video


class Regenerator:
    """Judges the steps of a chunk and regenerates them on a pruned context, at most ``max_regenerations`` times."""

    def __init__(self, adapter: Adapter, patch_size: tuple[int, int], policy: Policy, pruner: Pruner) -> None:
        self.adapter, self.patch_size, self.policy, self.pruner = adapter, patch_size, policy, pruner
        self.limit = int(getattr(policy, "max_regenerations", 1))
        self.replaying = False

    def judge(
        self, module: nn.Module, steps: list[Step], video: Video, chunk: Chunk, output: Any
    ) -> tuple[Any, Tensor]:
        """Judge the last of ``steps``; regenerate while the policy asks for it. Returns (output, prediction)."""
        call, prediction = steps[-1].call, steps[-1].prediction
        drift = None if call.commits else self._drift(call, prediction, video, output)
        if drift is None:
            # The first chunk of a video, and so the only read: was it handed in as a clean prefix?
            chunk.given = chunk.given or any(bool(flag) for flag in clean_flag(call))
            return output, prediction
        verdict, reading = self._judge(call, drift, video, chunk)
        if chunk.given:
            return output, prediction
        chunk.reading = reading
        while any(reading.prune) and chunk.regenerations < self.limit and self.pruner.enabled:
            if not self._prune(call, reading, chunk):
                break
            output = self._regenerate(module, steps, reading, chunk, output)
            prediction = self.adapter.prediction(call, output)
            drift = self._drift(call, prediction, video, output)
            assert drift is not None
            verdict, reading = self._judge(call, drift, video, chunk)
            chunk.accepted = reading.severity
        video.statistics = video.statistics.updated(verdict.severity)
        return output, prediction

    def prune_branch(self, call: Call, chunk: Chunk) -> bool:
        """Prune the context of another branch of guidance, once a pruned chunk; whether that killed anything."""
        if not chunk.tokens or call.stream in chunk.applied or call.start != chunk.start:
            return False
        chunk.applied.add(call.stream)
        dead = self.pruner.prune(call, chunk.tokens, chunk.start)
        chunk.dead += dead
        return dead > 0

    def replay_branch(self, module: nn.Module, step: Step, chunk: Chunk, output: Any) -> Any:
        """Prune another branch after its first call and call it again.

        Needed where the tokens shall come back: the first call may roll the cache, and a mark can be taken back only
        from rows that have not moved since.
        """
        if not self.prune_branch(step.call, chunk):
            return output
        return _select([bool(tokens) for tokens in chunk.tokens], self._replay(module, [step], chunk), output)

    def _drift(self, call: Call, prediction: Tensor, video: Video, output: Any) -> Tensor | None:
        """Token drift ``[B, N]`` against the previous chunk; None where there is no previous chunk."""
        flying = self.adapter.reference(call, output)
        previous = video.previous if flying is None else latent_summary(flying, self.patch_size)
        if previous is None:
            return None
        return token_drift(latent_summary(prediction, self.patch_size), previous)

    def _judge(self, call: Call, drift: Tensor, video: Video, chunk: Chunk) -> tuple[Verdict, Reading]:
        """Ask the policy; bring its verdict and the flags that waited on the device to the host, in one read."""
        history = video.history()
        verdict = self.policy.judge(drift, history)
        clean = clean_flag(call) if chunk.steps == 1 else []
        reading = read(verdict, drift, history, [*clean, *video.waiting])
        chunk.given = chunk.given or any(reading.flags[: len(clean)])
        video.learn_steps(reading.flags[len(clean) :])
        if not all(math.isfinite(value) for sample in reading.drift for value in sample):
            raise LatentsError(
                f"the chunk at latent frame {chunk.start}, or the one before it, holds NaN or inf: the model itself "
                "diverged, so no verdict is possible and none is pretended"
            )
        return verdict, reading

    def _prune(self, call: Call, reading: Reading, chunk: Chunk) -> bool:
        """Prune the flagged samples' tokens; False where the context held nothing that may be pruned."""
        flagged = zip(reading.tokens, reading.prune, strict=True)
        tokens = [chosen if prune else [] for chosen, prune in flagged]
        if not any(tokens):
            # A trigger without a token asks for another attempt on the context as it is (see controls.py).
            return True
        dead = self.pruner.prune(call, tokens, chunk.start)
        if not dead:
            chunk.notes.append("unstable, but the context holds nothing that may be pruned")
            return False
        chunk.tokens = _merged(chunk.tokens, tokens)
        chunk.applied.add(call.stream)
        chunk.dead += dead
        chunk.anchors = self.pruner.anchors
        return True

    def _regenerate(
        self, module: nn.Module, steps: list[Step], reading: Reading, chunk: Chunk, output: Any
    ) -> Any:
        """Run the steps again on the pruned context. The first prune must prove that it worked, or is undone."""
        again = self._replay(module, steps, chunk)
        if self.pruner.dead and not self.pruner.proven and not self._prove(steps[-1].call, again):
            chunk.tokens, chunk.dead = [], 0
            chunk.notes.append("self-check failed: pruning is off")
            warnings.warn(
                f"the first prune could not be proved ({self.pruner.finding}); it was undone, and this model is only "
                "observed from now on",
                TokenTrimWarning,
                stacklevel=2,
            )
            # The failed attempt has poisoned what the denoiser wrote of this chunk: write it once more.
            return self._replay(module, steps, chunk)
        chunk.regenerations += 1
        return _select(reading.prune, again, output)

    def _replay(self, module: nn.Module, steps: list[Step], chunk: Chunk) -> Any:
        """Call the denoiser again, carrying changed predictions forward to later steps with the same noise."""
        self.replaying = True
        try:
            output, before, after = None, None, None
            redraw = getattr(self.policy, "redraw", None)
            for step in steps:
                args, kwargs = step.args, step.kwargs
                if before is None and redraw is not None:
                    latents = redraw(step.call.latents, step.call.start)
                    args, kwargs = self.adapter.with_latents(step.call, args, kwargs, latents)
                if before is not None and after is not None:
                    latents = self.adapter.carry(step.call, before, after)
                    args, kwargs = self.adapter.with_latents(step.call, args, kwargs, latents)
                output = self._call_again(module, step.call, args, kwargs)
                chunk.extra_calls += 1
                before, after = step.prediction, self.adapter.prediction(step.call, output)
            return output
        finally:
            self.replaying = False

    def _call_again(self, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token = enter_tap(self.pruner.tap(call))
        try:
            return self.adapter.replay(module, args, kwargs)
        finally:
            leave_tap(token)

    def _prove(self, call: Call, output: Any) -> bool:
        """Self-check of the first prune: every layer dropped rows, and the output is finite."""
        finite = bool(torch.isfinite(self.adapter.prediction(call, output)).all())
        return self.pruner.check(finite)


def clean_flag(call: Call) -> list[Tensor]:
    """A flag on the device, where only the device knows whether the call's latents are clean (timestep 0)."""
    if call.commits is not None or call.timestep is None:
        return []
    return [call.timestep.abs().amax() == 0]


def _merged(old: list[list[int]], new: list[list[int]]) -> list[list[int]]:
    """Per-sample union of token lists."""
    return [sorted({*a, *b}) for a, b in zip(old, new, strict=True)] if old else [list(b) for b in new]


def _select(prune: list[bool], again: Any, output: Any) -> Any:
    """Take flagged samples from ``again``, the others from ``output``; both have B first in every tensor."""
    if all(prune):
        return again

    def choose(new: Any, old: Any) -> Any:
        if not isinstance(new, Tensor) or new.ndim == 0 or new.shape[0] != len(prune):
            return new
        chosen = torch.tensor(prune, device=new.device).view(-1, *[1] * (new.ndim - 1))
        return torch.where(chosen, new, old)

    return tree_map(choose, again, output)
