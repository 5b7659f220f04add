"""The heart of Algorithm 1: judge a chunk, prune its context, call the denoiser again."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks.adapter import Adapter, Call, Phase
from tokentrim_hooks.errors import LatentsError, TokenTrimWarning
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import Summary
from tokentrim_hooks.policy.views import Chunk, Verdict
from tokentrim_hooks.rollout.answers import in_flight_of, prediction_of, shown, unwritten
from tokentrim_hooks.rollout.judgement import Judgement
from tokentrim_hooks.rollout.opinion import Opinion
from tokentrim_hooks.rollout.proving import Prover
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.reading import Reading, check_values, checked, merged, read
from tokentrim_hooks.rollout.repeat.counters import Counters
from tokentrim_hooks.rollout.repeat.proof import require_repeated
from tokentrim_hooks.rollout.replays import Replayer
from tokentrim_hooks.rollout.state import ChunkState, Step, VideoState, noisy_flag


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
        failures: knows the ranks that share the model: they agree before any of them calls it again.
    """

    def __init__(
        self,
        adapter: Adapter,
        patch_size: tuple[int, int],
        policy: Policy,
        pruner: Pruner,
        failures: FailurePolicy | None = None,
    ) -> None:
        self.adapter, self.patch_size, self.policy, self.pruner = adapter, patch_size, policy, pruner
        self._failures = failures or FailurePolicy()
        self._replays = Replayer(adapter, policy, pruner, self._failures)
        self._prover = Prover(adapter, patch_size, pruner, self._failures, self._replays)
        self.without_marks = self._replays.without_marks

    def judge(self, case: Case, output: Any) -> Judgement:
        """Judge ``output`` of the case's last step; regenerate all its steps while the policy asks for it.

        Raises:
            LatentsError: the prediction, or the previous chunk, is not finite.
        """
        call, chunk = case.call, case.chunk
        found = Judgement(output, case.steps[-1].prediction)
        noisy = chunk.flag = noisy_flag(call) if chunk.steps == 1 and not chunk.given else None
        if self.pruner.steering is not None and self._prover.wants_order(case.module, call):
            ask = functools.partial(self._settle, case.video, chunk)
            found.proof_calls += self._prover.prove(case.module, case.steps[-1:], output, ask, prunes=False)
        if call.commits or self._has_no_predecessor(case):
            # The first chunk of a video, and so the only read: was it handed in as a clean prefix?
            found.given = noisy is not None and not noisy
            return found
        proven = self.pruner.proof.repeats(case.module)
        first_look = functools.partial(self._opinion, case, found, noisy, case.video.waiting, proven)
        opinion = self._settle(case.video, chunk, "verdict", first_look)
        found.given = opinion.given
        if opinion.reading is None:
            return found
        found.waiting = opinion.reading.waiting
        if found.given or chunk.given:
            return found
        found.reading, found.severity = opinion.reading, opinion.severity
        if opinion.again and not proven:
            opinion = self._prune_once_proven(case, opinion, found)
        self._regenerate_while_unstable(case, opinion, found)
        return found

    def prune_branch(self, call: Call, chunk: ChunkState) -> int:
        """Prune the context of another branch of guidance for a chunk that was pruned; return the rows that died."""
        return self.pruner.prune(call, chunk.tokens, chunk.start) if self.pruner.proof.enabled else 0

    def replay_branch(
        self, module: nn.Module, step: Step, chunk: ChunkState, video: VideoState, output: Any
    ) -> tuple[Any, int]:
        """:meth:`Replayer.regenerate` another branch, whose context was pruned after its first call.

        Needed where the tokens shall come back: the first call may roll the cache, and a mark can be taken back only
        from rows that have not moved since.
        """
        again: list[tuple[Any, int]] = []

        def call_again() -> Opinion:
            flags = [bool(tokens) for tokens in chunk.tokens]
            again.append(self._replays.regenerate(module, [step], flags, output))
            return Opinion()

        self._settle(video, chunk, "replay of a branch", call_again)
        return again[0]

    def prove_repeatable(
        self, module: nn.Module, steps: list[Step], output: Any, video: VideoState, chunk: ChunkState
    ) -> int:
        """:meth:`Prover.prove` that a call can be made twice; return the calls that it cost, none after the first."""
        return self._prover.prove(module, steps, output, functools.partial(self._settle, video, chunk))

    def agreed(self, turn: str, video: VideoState, chunk: ChunkState, decide: Callable[[], bool]) -> bool:
        """What ``decide`` says; where ranks share the model, what it says on the first of them."""
        return self._settle(video, chunk, turn, lambda: Opinion(again=decide())).again

    def all_finite(self, step: Step, video: VideoState) -> bool:
        """Whether a prediction is finite, on every rank."""
        check = functools.partial(lambda x: Opinion(holds=bool(torch.isfinite(x).all())), step.prediction)
        where = f"latent frame {step.call.start}"
        return self._failures.ranks.settle(f"check of video {video.number}, {where}", check).holds

    def _settle(self, video: VideoState, chunk: ChunkState, turn: str, propose: Callable[[], Opinion]) -> Opinion:
        """Agree on what ``propose`` says with the ranks that share the model; where there are none, just ask it."""
        where = f"video {video.number}, latent frame {chunk.start}, batch {video.batch}, tokens {chunk.grid}"
        return self._failures.ranks.settle(f"{turn}: {where}", propose)

    # ------------------------------------------------------------------------------------------ judgement

    def _opinion(
        self, case: Case, found: Judgement, noisy: Tensor | None, waiting: list[Tensor], proven: bool = True
    ) -> Opinion:
        """Judge an attempt and, on the rank that leads, prune for the next one where the verdict asks for it.

        The others prune once they have heard: whether a context holds anything to prune decides whether all call again.
        Nothing is pruned of a model that is not ``proven`` to give the same when a call is made twice.
        """
        view = self._view(case, found)
        if view is None:
            return Opinion(given=noisy is not None and not noisy)
        history = case.video.history()
        with unwritten(self.policy, "judge", view.prediction, view.drift, history.mean, history.std):
            answer = self.policy.judge(view, history)
        if answer is None:
            return Opinion()
        verdict = checked(answer, self.policy, view.drift)
        reading = self._read(verdict, view, case.video, noisy, waiting)
        again = not (reading.clean or case.chunk.given) and self._wants_more(reading, found)
        again = again and self._failures.ranks.leads and (not proven or self._prune(case, reading, found))
        return Opinion(reading, verdict.severity, reading.clean, again)

    def _prune_once_proven(self, case: Case, opinion: Opinion, found: Judgement) -> Opinion:
        """Before a model's first prune replay with nothing pruned, on all ranks; then the one that leads prunes."""
        assert opinion.reading is not None, "only a verdict asks for more"
        found.proof_calls += self.prove_repeatable(case.module, case.steps, found.output, case.video, case.chunk)
        prunes = self._failures.ranks.leads and self.pruner.proof.enabled  # the patch may have come off meanwhile
        prune = functools.partial(self._prune, case, opinion.reading, found)
        again = self.agreed("first prune", case.video, case.chunk, lambda: prunes and prune())
        return dataclasses.replace(opinion, again=again)

    def _has_no_predecessor(self, case: Case) -> bool:
        """Whether a chunk is a video's first, where that shows without asking the model: nothing is to be agreed on."""
        return case.video.previous is None and type(self.adapter).in_flight is Adapter.in_flight

    def _wants_more(self, reading: Reading, found: Judgement) -> bool:
        """Whether another attempt is asked for, and allowed."""
        return any(reading.prune) and found.regenerations < self.policy.max_regenerations and self.pruner.proof.enabled

    def _view(self, case: Case, found: Judgement) -> Chunk | None:
        """What the policy sees of an attempt; None where there is no previous chunk to compare with."""
        video, chunk = case.video, case.chunk
        flying = in_flight_of(self.adapter, case.call, found.output)
        previous = video.previous if flying is None else Summary.of(flying, self.patch_size)
        if previous is None:
            return None
        found.summary = summary = Summary.of(found.prediction, self.patch_size)
        return Chunk(
            phase=case.phase.value,
            index=video.index,
            start=chunk.start,
            frames=chunk.frames,
            grid=chunk.grid,
            prediction=shown(found.prediction),
            summary=summary,
            previous=previous,
            first=previous if video.first is None else video.first,
            drift=summary.drift(previous),
        )

    def _read(
        self, verdict: Verdict, view: Chunk, video: VideoState, noisy: Tensor | None, waiting: list[Tensor]
    ) -> Reading:
        """Bring a verdict and the flags that waited on the device to the host, in one read."""
        reading = read(verdict, view.drift, video.history(), noisy, waiting)
        if not math.isfinite(reading.drift.sum()):  # of float32 numbers, in float64
            self.pruner.require_layers_alike()
            where = f"the chunk at latent frame {view.start}, or the one before it,"
            raise LatentsError(f"{where} holds NaN or inf: the model itself diverged, so look at its inputs")
        check_values(reading, self.policy)
        return reading

    def _regenerate_while_unstable(self, case: Case, opinion: Opinion, found: Judgement) -> None:
        """Prune, generate again, judge again, at most R times (Algorithm 1)."""
        while opinion.again and opinion.reading is not None:
            attempts = found.regenerations
            attempt = functools.partial(self._attempt, case, opinion.reading, found)
            opinion = self._settle(case.video, case.chunk, f"regeneration {attempts + 1}", attempt)
            if not opinion.holds:
                found.regenerations = attempts
                undo = functools.partial(self._undo_attempt, case, found)
                opinion = self._settle(case.video, case.chunk, "undone prune", undo)
            if opinion.reading is None:
                break
            # The statistics take the severity of what is accepted, not of what was rejected.
            found.severity = opinion.severity
            found.accepted = opinion.reading

    def _attempt(self, case: Case, reading: Reading, found: Judgement) -> Opinion:
        """Regenerate the chunk and judge it again; an opinion that does not hold where the prune is not proved."""
        if not self._failures.ranks.leads:
            self._prune_in_step(case, reading, found)
        again = self._regenerate(case, reading, found)
        if again is None:
            return Opinion(holds=False)
        found.regenerations += 1
        return self._second_opinion(case, found, again)

    def _second_opinion(self, case: Case, found: Judgement, output: Any) -> Opinion:
        found.output = output
        found.prediction = prediction_of(self.adapter, case.call, output)
        return self._opinion(case, found, None, [])

    def _undo_attempt(self, case: Case, found: Judgement) -> Opinion:
        """Prune nothing more: of this rank, or of another one, a prune could not be proved."""
        self.pruner.give_up()
        found.tokens, found.dead = [], 0
        found.notes.append("self-check failed: pruning is off")
        warnings.warn(self.pruner.proof.refusal(), TokenTrimWarning, stacklevel=2)
        # The failed attempt has poisoned what the denoiser wrote of this chunk: write it once more.
        found.extra_calls += len(case.steps)
        return self._second_opinion(case, found, self._replays.replay(case.module, case.steps))

    def _prune_in_step(self, case: Case, reading: Reading, found: Judgement) -> None:
        """Prune as the leading rank has done; where that fails the replay is made all the same, as all make it."""
        try:
            self._prune(case, reading, found)
        except Exception as failure:
            if not self._failures.hears(failure):
                raise

    def _prune(self, case: Case, reading: Reading, found: Judgement) -> bool:
        """Prune the flagged samples' tokens; False where the context held nothing that may be pruned."""
        tokens = [chosen if prune else [] for chosen, prune in zip(reading.tokens, reading.prune, strict=True)]
        if not any(tokens):
            # A trigger without a token asks for another attempt on the context as it is (see controls.py).
            return True
        dead = self.pruner.prune(case.call, tokens, case.chunk.start)
        if not dead:
            found.notes.append("unstable, but the context holds nothing that may be pruned")
            return False
        found.tokens = merged(found.tokens, tokens)
        found.dead += dead
        found.anchors = self.pruner.anchors
        return True

    def _regenerate(self, case: Case, reading: Reading, found: Judgement) -> Any:
        """Run the steps again on the pruned context; None where the prune cannot be proved to have worked."""
        counters = Counters(case.module, [step.call.latents for step in case.steps])
        again, proof_calls = self._replays.regenerate(case.module, case.steps, reading.prune, found.output)
        require_repeated(case.module, counters)
        found.extra_calls += len(case.steps)
        found.proof_calls += proof_calls
        return None if self.pruner.dead and not self._prove(case.call, again) else again

    def _prove(self, call: Call, output: Any) -> bool:
        """Self-check of a prune: every layer dropped rows; and of the first one, that the output is finite."""
        proven = self.pruner.proof.proven
        return self.pruner.check(proven or bool(torch.isfinite(prediction_of(self.adapter, call, output)).all()))
