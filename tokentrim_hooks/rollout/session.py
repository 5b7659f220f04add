"""One session: the calls of one sampler over one context, video after video, and all that is remembered of them.

Each hook of a policy has one place: ``guide`` and ``hide`` in :meth:`Session.before`, ``judge`` in
:meth:`Regenerator.judge`, ``correct`` and ``settle`` in :meth:`Session.after`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks.adapter import Adapter, Call, Phase
from tokentrim_hooks.errors import SessionError, UnsupportedProbeError
from tokentrim_hooks.policy.drift import Summary
from tokentrim_hooks.policy.views import Place
from tokentrim_hooks.pruning.call_scope import CallScope, open_scope
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.rollout.answers import context_of, prediction_of
from tokentrim_hooks.rollout.guidance import Given, Guidance
from tokentrim_hooks.rollout.judgement import Judgement
from tokentrim_hooks.rollout.names import Key
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.regeneration import Case, Regenerator
from tokentrim_hooks.rollout.repeat.recall import Course
from tokentrim_hooks.rollout.shared import Shared
from tokentrim_hooks.rollout.state import ChunkState, Step, VideoState
from tokentrim_hooks.rollout.steering import Steering, place_of
from tokentrim_hooks.rollout.timeline import Timeline


@dataclass(slots=True)
class Found:
    """A denoiser call whose session is known.

    Attributes:
        session, call: the session, and the call in the core's words.
        key: names of what told it apart. arguments: by name.
    """

    session: Session
    call: Call
    key: Key
    arguments: Mapping[str, Any]


@dataclass(slots=True)
class Running:
    """A call between its hooks; with its arguments before other people's hooks, which a replay runs again."""

    module: Any
    found: Found
    phase: Phase | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Place | None = None
    course: Course | None = None


class Session:
    """Algorithm 1 of the paper over the calls of one sampler; what it remembers of video and chunk is in its timeline.

    Args:
        adapter: of the model; its own copy where a model has several sessions.
        shared: what all sessions of the model have in common.
    """

    def __init__(self, adapter: Adapter, shared: Shared) -> None:
        self.adapter, self.shared = adapter, shared
        self.steering = Steering(adapter, shared.policies)
        self.pruner = Pruner(adapter, shared.patch_size, shared.policy, shared.proof, shared.failures, self.steering)
        self._regenerator = Regenerator(adapter, shared.patch_size, shared.policy, self.pruner, shared.failures)
        self._guidance = Guidance(adapter, shared.policies, self.pruner, shared.failures)
        self.timeline = Timeline(adapter, shared, self.pruner)
        self._scope: CallScope | None = None

    # ------------------------------------------------------------------------------------------ a call

    def free(self) -> bool:
        """Whether a call may begin; False inside one of this session's own.

        Raises:
            SessionError: one is running in another thread or task.
        """
        idle, scope = self.idle(), self._scope
        if scope is None or scope.encloses:
            return idle
        raise SessionError(
            "two threads or tasks run this model at the same time, and their videos cannot be told apart: give each a "
            "model of its own, or let one wait for the other"
        )

    def take(self, found: Found) -> None:
        """A call begins: its scope comes before all else, so that whatever happens from now on happens to this call."""
        self._scope = open_scope(None, note=found)

    def idle(self) -> bool:
        """Whether none of its calls is running; notices one whose end no hook has seen (Ctrl-C, a cancelled task)."""
        if self._scope is not None and not self._scope.runs:
            self.fail()
        return self._scope is None

    def before(
        self, module: Any, found: Found, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Classify the call, accept the previous chunk if a new one begins, hand the tap its live keys.

        Returns:
            Arguments to make the call with, where a policy moves its latents.
        """
        call = found.call
        phase, chunk = self.timeline.classify(call), self.timeline.chunk
        if chunk is not None:
            chunk.hear(call, judged=phase is not None)
            if chunk.judgement is not None and self.shared.policy.persist:
                self._prune_branch(call, chunk)
        note = Running(module, found, phase, args, kwargs, self._place(call, phase))
        if self.steering.guides:
            note = self._guide(note, chunk)
        note.course = self.shared.course(module, self.timeline.video)
        if (scope := self._scope) is not None:  # else the patch has come off meanwhile
            scope.begin(self.pruner.tap(note.found.call, note.place), note)
        if chunk is not None:
            chunk.acts += self.pruner.acts
        return None if note.args is args and note.kwargs is kwargs else (note.args, note.kwargs)

    def after(self, module: nn.Module, running: Running, output: Any) -> Any:
        """Judge the chunk where the probe says so; return the output that the sampler goes on with."""
        call, phase = running.found.call, running.phase
        self.shared.proof.recall.end(module, running.course)
        video, chunk = self.timeline.video, self.timeline.chunk
        if chunk is None or video is None:
            return output
        tap = self._scope.tap if self._scope is not None else None
        missed = tap is not None and self.pruner.returned(call, tap, chunk.notes)
        # Where pruning lasts for one chunk only, another branch is pruned after its call, else before it.
        late = phase is None and not self.shared.policy.persist and chunk.awaits_pruning(call)
        if phase is None and not late and not missed:
            self._settle(running, video, chunk)
            return output
        x0 = prediction_of(self.adapter, call, output)
        step = Step(call, running.args, running.kwargs, x0, running.place, running.course)
        if missed and not self._regenerator.all_finite(step, video):
            output = self._regenerator.without_marks(module, step)
            chunk.notes.append("marks reached attention that is not tapped: pruning is off")
            step.prediction = prediction_of(self.adapter, call, output)
        if phase is None:
            return self._replay_branch(module, step, chunk, video, output) if late else output
        return self._after_step(running, step, phase, chunk, video, output)

    def release(self) -> None:
        """Let go of the call: also when the patch comes off in the middle of it."""
        scope, self._scope = self._scope, None
        self.pruner.let_go()
        if scope is not None:
            scope.close()

    def fail(self) -> None:
        """The call has not come back."""
        if self.timeline.chunk is not None:
            self.timeline.chunk.fail()
        self.release()

    def reset(self) -> None:
        """Forget statistics and marks: the next call begins a new video."""
        self.idle()
        self.timeline.reset()

    def abandon(self) -> None:
        """Step aside for good: leave no mark in any cache."""
        found = found_of(self._scope)
        self.timeline.abandon(None if found is None else found.call)

    def _after_step(
        self, running: Running, step: Step, phase: Phase, chunk: ChunkState, video: VideoState, output: Any
    ) -> Any:
        """A call of the judged stream has come back."""
        self.timeline.came_back(phase, step.call)
        prediction, summary = step.prediction, None
        if steps := self._steps_to_judge(step, phase, chunk, video):
            judgement = self._regenerator.judge(Case(running.module, steps, phase, video, chunk), output)
            self._enter(judgement, chunk, video)
            output, prediction, summary = judgement.output, judgement.prediction, judgement.summary
            judgement.output = None  # some models return their cache, which is the sampler's to keep
        if self.steering.corrects and phase is not Phase.COMMIT:
            output, prediction, summary = self._correct(step, chunk, video, output, prediction, summary)
        if self.steering.settles:
            self._settle(running, video, chunk)
        passing = not chunk.given and (video.told or chunk.steps <= video.usual_steps)
        chunk.remember(step.call, phase, prediction, summary, self.shared.patch_size, passing)
        video.returned = prediction
        if phase is Phase.COMMIT:
            self.shared.recorder.publish(video, chunk)
        return output

    def _enter(self, judgement: Judgement, chunk: ChunkState, video: VideoState) -> None:
        """Write a judgement into the state of the chunk and of the video."""
        chunk.judgement, chunk.judged_at = judgement, chunk.steps
        chunk.given = chunk.given or judgement.given
        chunk.notes += judgement.notes
        if judgement.tokens:
            chunk.pruned_streams.add(video.stream)
        if judgement.waiting is not None:
            self.timeline.learn_steps(video, judgement.waiting)
        if judgement.severity is not None:
            video.statistics = video.statistics.updated(judgement.severity)

    # ------------------------------------------------------------------------------------------ beside judging

    def _place(self, call: Call, phase: Phase | None) -> Place | None:
        """Where the video is, for policies; None before a video, and where no policy does more than judge."""
        video, chunk = self.timeline.video, self.timeline.chunk
        if not self.steering.active or video is None or chunk is None:
            return None
        self.steering.scene = video.scene
        return place_of(call, phase, video, chunk)

    def _guide(self, running: Running, chunk: ChunkState | None) -> Running:
        """Let policies move the latents of a denoising call."""
        call, phase = running.found.call, running.phase
        given = Given(running.module, call, running.args, running.kwargs, phase, running.place)
        moved, acts = self._guidance.guided(given, self.timeline.video, chunk)
        if chunk is not None:
            chunk.acts += acts
        found = dataclasses.replace(running.found, call=moved.call)
        return dataclasses.replace(running, found=found, args=moved.args, kwargs=moved.kwargs)

    def _correct(
        self, step: Step, chunk: ChunkState, video: VideoState, output: Any, x0: Tensor, summary: Summary | None
    ) -> tuple[Any, Tensor, Summary | None]:
        """Let policies correct the x0 of a chunk's last denoising call; keep that of earlier calls for them."""
        if step.place is None or not self.timeline.pace.is_last(chunk, video.usual_steps):
            chunk.earlier = [*chunk.earlier, x0][-self.steering.remembers :] if self.steering.remembers else []
            return output, x0, summary
        corrected, acts = self.steering.corrected(step.place, x0, chunk.earlier, video.scene)
        chunk.earlier, chunk.acts = [], chunk.acts + acts
        if corrected is x0:
            return output, x0, summary
        return self.adapter.with_prediction(step.call, output, corrected), corrected, None

    def _settle(self, running: Running, video: VideoState, chunk: ChunkState) -> None:
        """Let policies rewrite the rows that a commit has written, in every branch."""
        call, place = running.found.call, running.place
        if not self.steering.settles or place is None or place.phase != Phase.COMMIT.value:
            return
        context = context_of(self.adapter, call)
        assert isinstance(context, CacheRows), "only an adapter of a cache takes policies that rewrite rows"
        chunk.acts += self.steering.settle(call, place, context, video.scene)
        self.pruner.rewritten(context, call.stream)

    # ------------------------------------------------------------------------------------------ branches

    def _replay_branch(self, module: nn.Module, step: Step, chunk: ChunkState, video: VideoState, output: Any) -> Any:
        """Prune another branch after its call, and call it again."""
        assert chunk.judgement is not None, "a branch is pruned only with a judged chunk"
        chunk.judgement.proof_calls += self._regenerator.prove_repeatable(module, [step], output, video, chunk)
        if not self._regenerator.agreed("branch's prune", video, chunk, lambda: self._prune_branch(step.call, chunk)):
            return output
        chunk.judgement.extra_calls += 1
        output, calls = self._regenerator.replay_branch(module, step, chunk, video, output)
        chunk.judgement.proof_calls += calls
        return output

    def _prune_branch(self, call: Call, chunk: ChunkState) -> bool:
        """Prune another branch's context at its first call for a pruned chunk; whether that killed anything."""
        if not chunk.awaits_pruning(call):
            return False
        assert chunk.judgement is not None, "tokens come from a judgement"
        chunk.pruned_streams.add(call.stream)
        dead = self._regenerator.prune_branch(call, chunk)
        chunk.judgement.dead += dead
        return dead > 0

    # ------------------------------------------------------------------------------------------ judgement

    def _steps_to_judge(self, step: Step, phase: Phase, chunk: ChunkState, video: VideoState) -> list[Step]:
        """The calls to replay if the chunk is unstable; none while the probe has nothing to judge yet."""
        if phase not in (Phase.FIRST, Phase.REFINE):
            return []
        if self.shared.probe == "first-step":
            return [step] if phase is Phase.FIRST else []
        if video.streams:
            raise UnsupportedProbeError(
                "probe='candidate' cannot replay a chunk whose guidance branches keep two contexts; "
                "use probe='first-step'"
            )
        if video.waiting:  # where commits are not seen as such, nothing else reads how many steps a chunk has
            self.timeline.learn_steps(video, [not flag for flag in video.waiting])
        chunk.history.append(step)
        return chunk.history if self.timeline.pace.is_last(chunk, video.usual_steps) else []


def found_of(scope: CallScope | None) -> Found | None:
    """The call that a scope was opened for, made ready for or running; None if it is of no session."""
    note = None if scope is None else scope.note
    note = note.found if isinstance(note, Running) else note
    return note if isinstance(note, Found) else None
