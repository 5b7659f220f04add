"""Follows a denoiser through its videos: which call is which, when a chunk begins and is accepted.

The latents go down once: a call is parsed and classified here (session), its prediction summarised and judged by the
policy (regeneration.py), the verdict marked in the context (pruner.py). What climbs back is the output that the sampler
goes on with, and one record per chunk.

Each hook of a policy has one place: ``guide`` in :meth:`Rollout._begin_chunk`, ``hide`` in :meth:`Rollout._enter_tap`,
``judge`` in :meth:`Regenerator.judge`, ``correct`` and ``settle`` in :meth:`Rollout.after`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.profiler import record_function

from tokentrim_hooks.adapter import Adapter, Call, Match, Phase
from tokentrim_hooks.errors import LatentsError, UnsupportedProbeError
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.inspection import bind
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import RunningStatistics, grid_of, latent_summary
from tokentrim_hooks.pruning.call_scope import CallScope, open_scope
from tokentrim_hooks.report.record import Report
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.records import Recorder
from tokentrim_hooks.rollout.regeneration import Case, Regenerator
from tokentrim_hooks.rollout.state import ChunkState, Judgement, Step, VideoState

Probe = Literal["first-step", "candidate"]


class Rollout:
    """Algorithm 1 of the paper over denoiser calls; ``before``, ``after`` and ``leave`` are the forward hooks.

    The one owner of the video's and the chunk's state.
    """

    def __init__(
        self,
        adapter: Adapter,
        match: Match,
        policy: Policy,
        probe: Probe,
        recorder: Recorder,
        layers: int = 0,
        failures: FailurePolicy | None = None,
    ) -> None:
        self.adapter, self.patch_size, self.policy, self.probe = adapter, match.patch_size, policy, probe
        self.recorder = recorder
        self.unread_calls = 0
        self.pruner = Pruner(adapter, self.patch_size, policy, layers, failures)
        self._regenerator = Regenerator(adapter, self.patch_size, policy, self.pruner)
        self._video: VideoState | None = None
        self._videos = 0
        self._chunk: ChunkState | None = None
        self._call: Call | None = None
        self._phase: Phase | None = None
        # The arguments before other people's hooks changed them: a replay runs those hooks again.
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._scope: CallScope | None = None

    # ------------------------------------------------------------------------------------------ hooks

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Classify the call, accept the previous chunk if a new one begins, hand the tap its live keys."""
        if self._regenerator.replaying:
            return
        with record_function("tokentrim.before"):
            if self._scope is not None:
                # The call before ended in a way that no hook sees (Ctrl-C, a timeout, a cancelled task).
                self._fail()
            self._phase = None
            self._call = call = self.adapter.parse(bind(module, args, kwargs))
            if call is None:
                self.unread_calls += 1
                return
            self._given = args, kwargs
            self._phase = self._classify(call)
            if self._chunk is not None and self.policy.persist:
                self._prune_branch(call, self._chunk)
            self._enter_tap(call)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Judge the chunk where the probe says so; return the output that the sampler goes on with."""
        call, chunk, video = self._call, self._chunk, self._video
        if self._regenerator.replaying or call is None or chunk is None or video is None:
            return output
        with record_function("tokentrim.after"), torch.no_grad():
            self.pruner.follow(call)
            args, kwargs = self._given or (args, kwargs)
            missed = self.pruner.missed(self._scope.tap if self._scope is not None else None)
            late = self._phase is None and self._prune_late(call, chunk)
            if self._phase is None and not late and not missed:
                return output
            step = Step(call, args, kwargs, self.adapter.prediction(call, output))
            if missed and not bool(torch.isfinite(step.prediction).all()):
                output = self._regenerator.without_marks(module, step)
                chunk.notes.append("marks reached attention that is not tapped: pruning is off")
                step.prediction = self.adapter.prediction(call, output)
            if self._phase is None:
                return self._replay_branch(module, step, chunk, output) if late else output
            return self._after_step(module, step, self._phase, chunk, video, output)

    def leave(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """Runs also when the call raises (then there is no output): neither tap nor arguments outlive the call."""
        if not self._regenerator.replaying:
            if output is None:
                self._fail()
            self.release()

    def release(self) -> None:
        """Let go of the call: also when the patch comes off in the middle of it."""
        scope, self._scope = self._scope, None
        self._call = self._given = None
        if scope is not None:
            scope.close()

    def _fail(self) -> None:
        """The call has not come back."""
        if self._chunk is not None:
            self._chunk.failed = True
        self.release()

    def _enter_tap(self, call: Call) -> None:
        self._scope = open_scope(self.pruner.tap(call))

    def _after_step(
        self, module: nn.Module, step: Step, phase: Phase, chunk: ChunkState, video: VideoState, output: Any
    ) -> Any:
        """A call of the judged stream has come back."""
        chunk.count(phase)
        prediction, summary = step.prediction, None
        steps = self._steps_to_judge(step, phase, chunk, video)
        if steps:
            judgement = self._regenerator.judge(Case(module, steps, phase, video, chunk), output)
            self._enter(judgement, chunk, video)
            output, prediction, summary = judgement.output, judgement.prediction, judgement.summary
        chunk.remember(step.call, phase, prediction, summary, self.patch_size)
        video.returned = prediction
        if phase is Phase.COMMIT:
            self._publish()
        return output

    def _enter(self, judgement: Judgement, chunk: ChunkState, video: VideoState) -> None:
        """Write a judgement into the state of the chunk and of the video."""
        chunk.judgement = judgement
        chunk.given = chunk.given or judgement.given
        chunk.notes += judgement.notes
        if judgement.tokens:
            chunk.pruned_streams.add(video.stream)
        if judgement.waiting is not None:
            video.learn_steps(judgement.waiting)
        if judgement.severity is not None:
            video.statistics = video.statistics.updated(judgement.severity)

    # ------------------------------------------------------------------------------------------ branches

    def _prune_late(self, call: Call, chunk: ChunkState) -> bool:
        """Prune another branch after its call, where pruning lasts for one chunk only (else it is pruned before it)."""
        return not self.policy.persist and self._prune_branch(call, chunk)

    def _replay_branch(self, module: nn.Module, step: Step, chunk: ChunkState, output: Any) -> Any:
        assert chunk.judgement is not None, "a branch is pruned only with a judged chunk"
        chunk.judgement.extra_calls += 1
        return self._regenerator.replay_branch(module, step, chunk, output)

    def _prune_branch(self, call: Call, chunk: ChunkState) -> bool:
        """Prune the context of another branch, once per pruned chunk; whether that killed anything."""
        if not chunk.tokens or call.stream in chunk.pruned_streams or call.start != chunk.start:
            return False
        assert chunk.judgement is not None, "tokens come from a judgement"
        chunk.pruned_streams.add(call.stream)
        dead = self._regenerator.prune_branch(call, chunk)
        chunk.judgement.dead += dead
        return dead > 0

    # ------------------------------------------------------------------------------------------ phases

    def _classify(self, call: Call) -> Phase | None:
        """Phase of a call of the judged stream; None for the other branches of guidance.

        Guidance keeps one context per branch, and the branches take turns. The stream that a video's first call reads
        is judged; a call of another stream at the same frames is a branch of the same chunk, elsewhere a new video.
        """
        video, chunk = self._video, self._chunk
        if video is not None and video.has_branch(call, chunk):
            video.streams.add(call.stream)
            return None
        known = video is not None and call.stream == video.stream
        phase = self.adapter.phase(call, video.seen(chunk)) if video and known else Phase.FIRST
        if phase is Phase.REFINE and video is not None and video.failed_at_once(chunk):
            phase = Phase.FIRST
        if phase is Phase.FIRST:
            self._begin_chunk(call, new_video=not known)
        elif phase is Phase.COMMIT and chunk is not None:
            self._close(chunk)
        elif phase is Phase.RECACHE and video is not None:
            video.begin_scene()
        return phase

    def _begin_chunk(self, call: Call, new_video: bool) -> None:
        if not new_video and self._video is not None:
            new_video = self.adapter.restarts(call, self._video.seen(self._chunk))
        self.finish_chunk()
        if new_video:
            self.reset()
        video = self._video = self._video or self._new_video(call)
        if call.latents.shape[0] != video.batch:
            raise LatentsError(
                f"the batch size changed from {video.batch} to {call.latents.shape[0]} in the middle of a rollout; "
                "call handle.reset() before a new video"
            )
        if self.adapter.changes_prompt(call):
            video.begin_scene()
        accepted = self.adapter.accepted(call)
        if accepted is not None:
            video.previous = latent_summary(accepted, self.patch_size)
        self._chunk = ChunkState(call.start, call.frames, grid_of(call.latents, self.patch_size))

    def _new_video(self, call: Call) -> VideoState:
        batch = int(call.latents.shape[0])
        self._videos += 1
        return VideoState(call.stream, batch, RunningStatistics.empty(batch, call.latents.device))

    def finish_chunk(self) -> None:
        """Accept the chunk in progress: it becomes the predecessor and is recorded."""
        video, chunk = self._video, self._chunk
        if video is None or chunk is None:
            return
        self._close(chunk)
        if chunk.committed:
            video.usual_steps = chunk.steps
        else:
            video.waiting = chunk.clean
        self._publish()
        video.accept(chunk.summary)
        self._chunk = None

    def reset(self) -> None:
        """Forget statistics and marks: the next call begins a new video."""
        self.finish_chunk()
        self.pruner.clear()
        self._video = None

    def abandon(self) -> None:
        """Step aside for good: leave no mark in any cache."""
        if self._chunk is not None:
            self._chunk.notes.append("tokentrim stepped aside")
        self.pruner.clear()

    def _close(self, chunk: ChunkState) -> None:
        """The chunk is denoised: its prune is final or taken back; nothing kept for it holds on to the cache."""
        if not self.policy.persist and self.pruner.dead:
            self.pruner.revive(chunk.start)
            if chunk.judgement is not None:
                chunk.judgement.tokens = []
        self.pruner.settle()
        chunk.history = []

    # ------------------------------------------------------------------------------------------ judgement

    def _steps_to_judge(self, step: Step, phase: Phase, chunk: ChunkState, video: VideoState) -> list[Step]:
        """The calls to replay if the chunk is unstable; none while the probe has nothing to judge yet."""
        if phase not in (Phase.FIRST, Phase.REFINE):
            return []
        if self.probe == "first-step":
            return [step] if phase is Phase.FIRST else []
        if video.streams:
            raise UnsupportedProbeError(
                "probe='candidate' cannot replay a chunk whose guidance branches keep two contexts; "
                "use probe='first-step'"
            )
        if video.waiting and not video.usual_steps:
            # Where commits are not seen as such, nothing else ever reads how many steps a chunk has.
            video.learn_steps([bool(flag) for flag in video.waiting])
        chunk.history.append(step)
        return chunk.history if chunk.steps == video.usual_steps else []

    # ------------------------------------------------------------------------------------------ records

    def snapshot(self) -> Report:
        """The report so far, the chunk in progress included."""
        return self.recorder.snapshot(self._videos - 1, self._video, self._chunk)

    def _publish(self) -> None:
        self.recorder.publish(self._videos - 1, self._video, self._chunk)
