"""The heart of Algorithm 1: judge a chunk, prune its context, call the denoiser again."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._pytree import tree_map

from tokentrim_hooks.adapter import Adapter, Call, Phase
from tokentrim_hooks.errors import LatentsError, TokenTrimWarning, UnsupportedContextError
from tokentrim_hooks.policy.base import Chunk, Policy, Verdict
from tokentrim_hooks.policy.drift import latent_summary, token_drift
from tokentrim_hooks.pruning.call_scope import scoped
from tokentrim_hooks.rollout.counters import Counters
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.reading import Reading, read
from tokentrim_hooks.rollout.state import ChunkState, Judgement, Step, VideoState, clean_flag


@dataclass(frozen=True)
class Case:
    """What is to be judged: the last of ``steps``, calls of ``module``, in the state that the rollout is in."""

    module: nn.Module
    steps: list[Step]
    phase: Phase
    video: VideoState
    chunk: ChunkState

    @property
    def call(self) -> Call:
        """The call whose prediction is judged."""
        return self.steps[-1].call


class Regenerator:
    """Judges a chunk and regenerates it on a pruned context; reads the rollout's state and writes none of it.

    Args:
        adapter, patch_size: of the model.
        policy: the one that judges.
        pruner: applies its verdicts.
    """

    def __init__(self, adapter: Adapter, patch_size: tuple[int, int], policy: Policy, pruner: Pruner) -> None:
        self.adapter, self.patch_size, self.policy, self.pruner = adapter, patch_size, policy, pruner

    def judge(self, case: Case, output: Any) -> Judgement:
        """Judge ``output`` of the case's last step; regenerate all its steps while the policy asks for it.

        Raises:
            LatentsError: the prediction, or the previous chunk, is not finite.
        """
        call, chunk = case.call, case.chunk
        found = Judgement(output, case.steps[-1].prediction)
        clean = clean_flag(call) if chunk.steps == 1 and not chunk.given else None
        view = None if call.commits else self._view(case, found)
        if view is None:
            # The first chunk of a video, and so the only read: was it handed in as a clean prefix?
            found.given = clean is not None and bool(clean)
            return found
        verdict = self.policy.judge(view, case.video.history())
        if verdict is None:
            return found
        reading = self._read(verdict, view, case.video, clean, case.video.waiting)
        found.given, found.waiting = reading.clean, reading.waiting
        if found.given or chunk.given:
            return found
        found.reading, found.severity = reading, verdict.severity
        self._regenerate_while_unstable(case, reading, found)
        return found

    def prune_branch(self, call: Call, chunk: ChunkState) -> int:
        """Prune the context of another branch of guidance for a chunk that was pruned; return the rows that died."""
        return self.pruner.prune(call, chunk.tokens, chunk.start)

    def replay_branch(self, module: nn.Module, step: Step, chunk: ChunkState, output: Any) -> Any:
        """Call another branch again, whose context was pruned after its first call.

        Needed where the tokens shall come back: the first call may roll the cache, and a mark can be taken back only
        from rows that have not moved since.
        """
        return _select([bool(tokens) for tokens in chunk.tokens], self._replay(module, [step]), output)

    # ------------------------------------------------------------------------------------------ judgement

    def _view(self, case: Case, found: Judgement) -> Chunk | None:
        """What the policy sees of an attempt; None where there is no previous chunk to compare with."""
        video, chunk = case.video, case.chunk
        flying = self.adapter.reference(case.call, found.output)
        previous = video.previous if flying is None else latent_summary(flying, self.patch_size)
        if previous is None:
            return None
        found.summary = summary = latent_summary(found.prediction, self.patch_size)
        return Chunk(
            phase=case.phase.value,
            index=video.index,
            start=chunk.start,
            frames=chunk.frames,
            grid=chunk.grid,
            prediction=found.prediction,
            summary=summary,
            previous=previous,
            first=previous if video.first is None else video.first,
            drift=token_drift(summary, previous),
        )

    def _read(
        self, verdict: Verdict, view: Chunk, video: VideoState, clean: Tensor | None, waiting: list[Tensor]
    ) -> Reading:
        """Bring a verdict and the flags that waited on the device to the host, in one read."""
        reading = read(verdict, view.drift, video.history(), clean, waiting)
        if not bool(torch.isfinite(reading.drift).all()):
            raise LatentsError(
                f"the chunk at latent frame {view.start}, or the one before it, holds NaN or inf: the model itself "
                "diverged, so no verdict is possible and none is pretended"
            )
        return reading

    def _regenerate_while_unstable(self, case: Case, reading: Reading, found: Judgement) -> None:
        """Prune, generate again, judge again, at most R times (Algorithm 1)."""
        while any(reading.prune) and found.regenerations < self.policy.max_regenerations and self.pruner.proof.enabled:
            if not self._prune(case, reading, found):
                break
            found.output = self._regenerate(case, reading, found)
            found.prediction = self.adapter.prediction(case.call, found.output)
            view = self._view(case, found)
            verdict = None if view is None else self.policy.judge(view, case.video.history())
            if view is None or verdict is None:
                break
            # The statistics take the severity of what is accepted, not of what was rejected.
            reading, found.severity = self._read(verdict, view, case.video, None, []), verdict.severity
            found.accepted = reading.severity.tolist()

    def _prune(self, case: Case, reading: Reading, found: Judgement) -> bool:
        """Prune the flagged samples' tokens; False where the context held nothing that may be pruned."""
        flagged = zip(reading.tokens, reading.prune, strict=True)
        tokens = [chosen if prune else [] for chosen, prune in flagged]
        if not any(tokens):
            # A trigger without a token asks for another attempt on the context as it is (see controls.py).
            return True
        dead = self.pruner.prune(case.call, tokens, case.chunk.start)
        if not dead:
            found.notes.append("unstable, but the context holds nothing that may be pruned")
            return False
        found.tokens = _merged(found.tokens, tokens)
        found.dead += dead
        found.anchors = self.pruner.anchors
        return True

    # ------------------------------------------------------------------------------------------ replay

    def without_marks(self, module: nn.Module, step: Step) -> Any:
        """Call again what our marks have poisoned, with all of them gone; pruning stays off.

        For a model that attends through a path which the first prune did not show: dense in one step and sparse in
        another, or with attention processors that were exchanged since.
        """
        self.pruner.give_up()
        warnings.warn(
            "pruned rows reached attention that is not tapped, in a path that the first prune did not show; they are "
            "back, the call was repeated, and this model is only observed from now on",
            TokenTrimWarning,
            stacklevel=2,
        )
        return self._call_again(module, step, None)

    def _regenerate(self, case: Case, reading: Reading, found: Judgement) -> Any:
        """Run the steps again on the pruned context. The first prune must prove that it worked, or is undone."""
        counters = Counters(case.module)
        again = self._replay(case.module, case.steps)
        _require_repeatable(counters)
        found.extra_calls += len(case.steps)
        if self.pruner.dead and not self._prove(case.call, again):
            found.tokens, found.dead = [], 0
            found.notes.append("self-check failed: pruning is off")
            warnings.warn(
                f"a prune could not be proved ({self.pruner.proof.finding}); it was undone, and this model is only "
                "observed from now on",
                TokenTrimWarning,
                stacklevel=2,
            )
            # The failed attempt has poisoned what the denoiser wrote of this chunk: write it once more.
            found.extra_calls += len(case.steps)
            return self._replay(case.module, case.steps)
        found.regenerations += 1
        return _select(reading.prune, again, found.output)

    def _replay(self, module: nn.Module, steps: list[Step]) -> Any:
        """Call the denoiser again for each step, with the same noise.

        A later step's latents were made from the earlier step's prediction, which has changed: the adapter carries the
        change over. The first step's latents are noise, which only a control policy draws anew.
        """
        with record_function("tokentrim.replay"):
            output = self._call_again(module, steps[0], self._redrawn(steps[0]))
            for earlier, step in itertools.pairwise(steps):
                changed = self.adapter.prediction(earlier.call, output)
                latents = self.adapter.carry(step.call, earlier.prediction, changed)
                output = self._call_again(module, step, latents)
        return output

    def _redrawn(self, step: Step) -> Tensor | None:
        return self.policy.redraw(step.call.latents, step.call.start)

    def _call_again(self, module: nn.Module, step: Step, latents: Tensor | None) -> Any:
        """Call the denoiser as in ``step``, with other ``latents`` unless None, and its tap on."""
        args, kwargs = step.args, step.kwargs
        if latents is not None:
            args, kwargs = self.adapter.with_latents(step.call, args, kwargs, latents)
        with scoped(self.pruner.tap(step.call), replayer=self.pruner.proof):
            return self.adapter.replay(module, args, kwargs)

    def _prove(self, call: Call, output: Any) -> bool:
        """Self-check of a prune: every layer dropped rows; and of the first one, that the output is finite."""
        proven = self.pruner.proof.proven
        return self.pruner.check(proven or bool(torch.isfinite(self.adapter.prediction(call, output)).all()))


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


def _require_repeatable(before: Counters) -> None:
    """Raise UnsupportedContextError, with the counts put back, if a replay has changed what the model keeps.

    A model that counts its calls (TeaCache and its kind) takes the repeated call for the next one. Asked at every
    replay, for such a thing may be switched on at any time.
    """
    changed = before.put_back()
    if changed:
        raise UnsupportedContextError(
            f"the model counts its calls ({', '.join(changed[:4])}), so that a chunk cannot be regenerated: the "
            "repeated call would count as the next one. Switch off what counts (TeaCache, MagCache), or override "
            "Adapter.replay"
        )
