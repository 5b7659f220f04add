"""Which video, which chunk, which phase: where a session is, from call to call. Marks are made elsewhere."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from tokentrim_hooks.adapter import Adapter, Call, Phase, Seen
from tokentrim_hooks.errors import LatentsError, TokenTrimError
from tokentrim_hooks.inspection import shares_storage
from tokentrim_hooks.policy.drift import RunningStatistics, Summary, grid_of
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.pruning.tombstones import Traces
from tokentrim_hooks.rollout.answers import accepted_of, context_of, phase_of, restarts_of
from tokentrim_hooks.rollout.loop import Loop
from tokentrim_hooks.rollout.pace import Pace
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.renewal import Renewal, prints_of
from tokentrim_hooks.rollout.shared import Shared
from tokentrim_hooks.rollout.state import ChunkState, VideoState

ASIDE = "tokentrim stepped aside"


class Timeline:
    """The videos of one session, one after the other.

    Args:
        adapter: tells phases apart. shared: of the model. pruner: told when a chunk or a video has ended.

    Attributes:
        video, chunk: in progress; None before the first call.
    """

    def __init__(self, adapter: Adapter, shared: Shared, pruner: Pruner) -> None:
        self.adapter, self.shared, self.pruner = adapter, shared, pruner
        self.video: VideoState | None = None
        self.chunk: ChunkState | None = None
        rolls = type(adapter).in_flight is not Adapter.in_flight
        self.pace = Pace(shared.habits, shared.probe == "candidate" and shared.policy.judges, rolls)
        self._loop, self._renewal = Loop(), Renewal()
        self._left: list[Traces] = []
        self._midway = False
        self.compares = any(policy.compares for policy in shared.policies)
        self.keeps_opening = any(policy.overrides("correct") for policy in shared.policies)

    def classify(self, call: Call) -> Phase | None:
        """Phase of a call of the judged stream; None for the other branches of guidance.

        Guidance keeps one context per branch, and the branches take turns. The stream that a video's first call reads
        is judged; a call of another stream at the same frames is a branch of the same chunk, elsewhere a new video.
        """
        if self._midway:
            # The call before was broken off in here (Ctrl-C, a failure): nobody can go on from where that has left us.
            self.reset()
        self._midway = True
        phase = self._place(call)
        self._midway = False
        return phase

    def _place(self, call: Call) -> Phase | None:
        video, chunk = self.video, self.chunk
        if video is not None and video.has_branch(call, chunk):
            video.streams.add(call.stream)
            return None
        known = video is not None and call.stream == video.stream
        phase = phase_of(self.adapter, call, self._seen(video, chunk)) if video and known else Phase.FIRST
        if phase is Phase.REFINE and video is not None and (video.failed_at_once(chunk) or self._was_left(call)):
            phase = Phase.FIRST
        elif known:
            phase = self.pace.phase(phase, call, video, chunk)
        if phase is Phase.FIRST:
            self._begin_chunk(call, new_video=not known)
        elif phase is Phase.COMMIT and chunk is not None and video is not None:
            self._close(chunk)
            self._learn(video, chunk)
        elif phase is Phase.RECACHE and video is not None:
            # Once more when the next chunk begins: the one in progress, which is of the scene before, comes in between.
            video.begin_scene()
            video.cut = True
        return phase

    def _begin_chunk(self, call: Call, new_video: bool) -> None:
        if not new_video and self.video is not None:
            new_video = restarts_of(self.adapter, call, self._seen(self.video, self.chunk))
        if not new_video and self.video is not None and self.chunk is not None:
            self._learn(self.video, self.chunk)
        self.finish_chunk()
        if new_video:
            self.reset()
        video = self.video = self.video or self._new_video(call)
        if call.latents.shape[0] != video.batch:
            raise LatentsError(
                f"the batch size changed from {video.batch} to {call.latents.shape[0]} in the middle of a rollout; "
                "call handle.reset() before a new video"
            )
        if self.adapter.changes_prompt(call) or video.cut:
            video.begin_scene()
        accepted = accepted_of(self.adapter, call)
        video.told = accepted is not None
        if accepted is not None:
            video.previous = Summary.of(accepted, self.shared.patch_size)
        grid = grid_of(call.latents, self.shared.patch_size)
        self.chunk = ChunkState(call.start, call.frames, grid, self.adapter.steps(call) or 0)
        if not video.index:
            self._loop.begin()
            self._renewal.begin(call)
        else:
            self._renewal.forget()

    def _was_left(self, call: Call) -> bool:
        """Whether a video's first chunk was broken off between two calls, so that this one begins it anew."""
        video, chunk = self.video, self.chunk
        if video is None or chunk is None or video.index:
            return False
        goes_on, given = self._loop.goes_on, prints_of(call)
        if goes_on and not self._renewal.renewed(given) and not self._renewal.repeats(call):
            return False
        anew = self.pace.begins_anew(call, chunk, left=goes_on is False or self._renewal.written(given))
        if not anew:
            self._loop.learn()
        return anew

    def came_back(self, phase: Phase, call: Call) -> None:
        """A call of the judged stream has come back."""
        if self.chunk is not None:
            self.chunk.count(phase, call)
        if self.video is not None and not self.video.index:
            self._renewal.came_back(call)

    def _new_video(self, call: Call) -> VideoState:
        batch = int(call.latents.shape[0])
        if call.start > 0:
            # Amid a video, perhaps on the copy of a pruned cache.
            self.pruner.inherit(call)
        self.pace.begin_video()
        number = self.shared.recorder.number_video()
        statistics = RunningStatistics.empty(batch, call.latents.device, self.shared.policy.recalls)
        return VideoState(number, call.stream, batch, statistics)

    def finish_chunk(self) -> None:
        """Accept the chunk in progress: it becomes the predecessor and is recorded."""
        video, chunk = self.video, self.chunk
        if video is None or chunk is None:
            return
        self._close(chunk)
        if chunk.committed or not chunk.flags:
            video.usual_steps = chunk.steps
        elif not chunk.failed:
            video.waiting = chunk.flags
        self.shared.recorder.publish(video, chunk)
        self.pruner.end_chunk()
        if self.compares and chunk.latents is not None:
            video.scene.frames.add(chunk.start, chunk.latents)
        if self.keeps_opening and video.scene.opening is None and chunk.latents is not None:
            video.scene.opening = chunk.copied(chunk.latents)
        video.accept(chunk.summary_at_end(self.shared.patch_size))
        self.chunk = None

    def reset(self) -> None:
        """Forget statistics and marks: the next call begins a new video."""
        self.finish_chunk()
        self.pruner.clear()
        self.video = None

    def abandon(self, call: Call | None) -> None:
        """Step aside for good: leave no mark in any cache. Once more when ``call``, under way, has come back.

        By then it may have written what it had made of marked rows, in the same memory or in a cache made anew.
        """
        if self.chunk is not None and ASIDE not in self.chunk.notes:
            self.chunk.notes.append(ASIDE)
        left, self._left = self._left, self.pruner.clear()
        for traces in left:
            traces.clear()
        if left and call is not None:
            # A context that the adapter refuses by now was written where it was, or is nobody's that we know.
            with contextlib.suppress(TokenTrimError):
                context = context_of(self.adapter, call)
                Traces.of(context.values if isinstance(context, CacheRows) else ()).clear()

    def _seen(self, video: VideoState, chunk: ChunkState | None) -> Seen:
        return video.seen(chunk, self.pace.usual(video, chunk))

    def _learn(self, video: VideoState, chunk: ChunkState) -> None:
        """A chunk is over: how many denoising calls has it taken?"""
        self.pace.note(video, chunk)
        self.pace.keep(chunk)
        if chunk.committed or chunk.phase == Phase.COMMIT.value or not chunk.flags:
            self.pace.learn(video, chunk)

    def learn_steps(self, video: VideoState, clean: list[bool]) -> None:
        """The flags of the chunk before were read: those of its calls that were noisy were its denoising calls."""
        before = video.usual_steps
        video.learn_steps(clean)
        if before and video.usual_steps != before and not (self.chunk and self.chunk.said):
            self.pace.differ(video.usual_steps, before)

    def _close(self, chunk: ChunkState) -> None:
        """The chunk is denoised: its prune is final or taken back; nothing kept for it holds on to the cache."""
        if not self.shared.policy.persist and self.pruner.dead:
            self.pruner.revive(chunk.start)
            if chunk.judgement is not None:
                chunk.judgement.tokens = []
        self.pruner.settle()
        chunk.history = []

    # ------------------------------------------------------------------------------------------ unknown contexts

    def takes(self, call: Call) -> bool:
        """Whether a call on a context never seen before belongs here, as another branch of guidance.

        Both branches of a step are given the same noisy latents; two videos are not, but perhaps at their first step.
        """
        video, chunk = self.video, self.chunk
        if video is None or chunk is None or not video.has_branch(call, chunk) or not _same(call.latents, chunk.noisy):
            return False
        video.unsure[call.stream] = call
        return True

    def mistook(self, call: Call) -> Call | None:
        """The first call on this one's context, if it was taken for that of a branch and is another video's."""
        video, chunk = self.video, self.chunk
        first = None if video is None else video.unsure.pop(call.stream, None)
        if video is None or chunk is None or first is None:
            return None
        # Branches take turns: one that calls twice while the judged one is silent is no branch of it.
        mistaken = call.start != chunk.start or call.stream in chunk.heard or not _same(call.latents, chunk.noisy)
        if not mistaken:
            return None
        video.streams.discard(call.stream)
        return first

    def make_up_for(self, call: Call) -> None:
        """Begin with a call that was taken for another session's when it was made."""
        phase = self.classify(call)
        if self.chunk is not None and phase is not None:
            self.chunk.make_up_for(call, phase)

    def continues(self, call: Call) -> bool:
        """Whether a call on a context never seen before goes on where this session, whose own is gone, has stopped."""
        chunk = self.chunk
        if chunk is None or (call.start == 0 and not self._goes_on(call, chunk)):
            return False
        if call.start == chunk.start:
            return not self.pace.begins_anew(call, chunk)
        return call.start == chunk.start + chunk.frames

    def _goes_on(self, call: Call, chunk: ChunkState) -> bool:
        """Whether a call at a video's first frames, where the next video starts too, is of this one. Reads the device.

        A quieter one is; so is a clean one of what the sampler was handed, and not that of another video's prefix.
        """
        if chunk.start != 0 or call.timestep is None or not chunk.levels or chunk.committed:
            return False
        if self.video is not None and shares_storage(call.latents, self.video.returned):
            return True
        return bool(call.timestep.amax() > 0)


def _same(latents: Tensor, others: Tensor | None) -> bool:
    """Whether two calls were given the same latents: the same memory, else the same numbers, which have to be read."""
    if others is None or latents.shape != others.shape or latents.device != others.device:
        return False
    return shares_storage(latents, others) or torch.equal(latents, others.to(latents.dtype))
