"""Follows a denoiser through its videos: which call is which, when a chunk begins and is accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Token
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokentrim_hooks.adapter import Adapter, Call, Match, Phase
from tokentrim_hooks.errors import LatentsError, UnsupportedProbeError
from tokentrim_hooks.inspection import bind
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import RunningStatistics, grid_of, latent_summary
from tokentrim_hooks.pruning.tap import CallTap, enter_tap, leave_tap, unforgiving
from tokentrim_hooks.report.observers import Observer, tell
from tokentrim_hooks.report.record import ChunkRecord, Report
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.records import records_of
from tokentrim_hooks.rollout.regeneration import Regenerator, clean_flag
from tokentrim_hooks.rollout.state import Chunk, Step, Video

Probe = Literal["first-step", "candidate"]


class Rollout:
    """Algorithm 1 of the paper over denoiser calls; ``before``, ``after`` and ``leave`` are the forward hooks."""

    def __init__(
        self,
        adapter: Adapter,
        match: Match,
        policy: Policy,
        probe: Probe,
        report: Report,
        layers: int = 0,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.adapter, self.patch_size, self.policy = adapter, match.patch_size, policy
        self.probe, self.report = probe, report
        self.pruner = Pruner(adapter, match.patch_size, policy, layers)
        self.persist = bool(getattr(policy, "persist", True))
        self.observers = list(observers)
        self.unread_calls = 0
        self.forgive: Callable[[Exception], bool] = unforgiving
        """What a tap asks that fails outside of a replay, in the middle of the model's own call."""
        self._regenerator = Regenerator(adapter, match.patch_size, policy, self.pruner)
        self._video: Video | None = None
        self._videos = 0
        self._chunk: Chunk | None = None
        self._call: Call | None = None
        self._phase: Phase | None = None
        # The arguments before other people's hooks changed them: a replay runs those hooks again.
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._entered: list[Token[CallTap | None]] = []

    # ------------------------------------------------------------------------------------------ hooks

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Classify the call, accept the previous chunk if a new one begins, hand the tap its live keys."""
        if self._regenerator.replaying:
            return
        self._phase = None
        self._call = call = self.adapter.parse(bind(module, args, kwargs))
        if call is None:
            self.unread_calls += 1
            return
        self._given = args, kwargs
        self._phase = self._classify(call)
        if self._chunk is not None and self.persist:
            self._regenerator.prune_branch(call, self._chunk)
        tap = self.pruner.tap(call)
        if tap is not None:
            tap.forgive = self.forgive
        self._entered.append(enter_tap(tap))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Judge the chunk where the probe says so; return the output that the sampler goes on with."""
        call, phase, chunk, video = self._call, self._phase, self._chunk, self._video
        if self._regenerator.replaying or call is None or chunk is None or video is None:
            return output
        self.pruner.follow(call)
        args, kwargs = self._given or (args, kwargs)
        if phase is None:
            return self._after_branch(module, call, args, kwargs, output)
        with torch.no_grad():
            chunk.count(phase)
            prediction = self.adapter.prediction(call, output)
            if phase in (Phase.FIRST, Phase.REFINE):
                steps = self._steps_to_judge(Step(call, args, kwargs, prediction), phase, chunk, video)
                if steps:
                    output, prediction = self._regenerator.judge(module, steps, video, chunk, output)
            self._remember(call, phase, prediction, chunk)
        video.returned = prediction
        if phase is Phase.COMMIT:
            self._publish()
        return output

    def _after_branch(
        self, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Another branch of guidance: where pruning lasts for one chunk only, it is pruned here, else before."""
        if self.persist or self._chunk is None:
            return output
        with torch.no_grad():
            step = Step(call, args, kwargs, self.adapter.prediction(call, output))
            return self._regenerator.replay_branch(module, step, self._chunk, output)

    def leave(self, _module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> None:
        """Runs also when the call raises: neither a tap nor the arguments (a cache among them) outlive the call."""
        if not self._regenerator.replaying:
            if _output is None and self._chunk is not None:
                self._chunk.failed = True
            self.release()

    def release(self) -> None:
        """Let go of the call: also when the patch comes off in the middle of it."""
        self._call = self._given = None
        while self._entered:
            leave_tap(self._entered.pop())

    # ------------------------------------------------------------------------------------------ phases

    def _classify(self, call: Call) -> Phase | None:
        """Phase of a call of the judged stream; None for the other branches of guidance."""
        video, chunk = self._video, self._chunk
        if video is not None and call.stream != video.stream and _is_branch(call, video, chunk):
            video.streams.add(call.stream)
            return None
        known = video is not None and call.stream == video.stream
        phase = self.adapter.phase(call, video.seen(chunk)) if video and known else Phase.FIRST
        if phase is Phase.REFINE and _failed_at_once(video, chunk):
            phase = Phase.FIRST
        if phase is Phase.FIRST:
            self._begin_chunk(call, new_video=not known)
        elif phase is Phase.COMMIT and chunk is not None:
            self._close(chunk)
        elif phase is Phase.RECACHE and video is not None:
            video.statistics = RunningStatistics.empty(video.batch, call.latents.device)
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
            video.statistics = RunningStatistics.empty(video.batch, call.latents.device)
        accepted = self.adapter.accepted(call)
        if accepted is not None:
            video.previous = latent_summary(accepted, self.patch_size)
        self._chunk = Chunk(call.start, call.frames, grid_of(call.latents, self.patch_size))

    def _new_video(self, call: Call) -> Video:
        batch = int(call.latents.shape[0])
        self._videos += 1
        return Video(call.stream, batch, RunningStatistics.empty(batch, call.latents.device))

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
        video.previous = chunk.latest if chunk.latest is not None else video.previous
        self._publish()
        video.chunk += 1
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

    def snapshot(self) -> Report:
        """The report so far, the chunk in progress included."""
        pending = [] if self._chunk is None or self._chunk.published else self._records()
        return Report(dict(self.report.settings), [*self.report.records, *pending])

    def _publish(self) -> None:
        """Record the chunk and tell the observers, once: at its commit, or at the next chunk where there is none."""
        chunk, records = self._chunk, self._records()
        if chunk is None or chunk.published or not records:
            return
        chunk.published = True
        self.report.records.extend(records)
        if chunk.latents is not None:
            tell(self.observers, "on_chunk", records, chunk.latents)

    def _close(self, chunk: Chunk) -> None:
        """The chunk is denoised: its prune is final or taken back; nothing kept for it holds on to the cache."""
        if not self.persist and chunk.tokens:
            self.pruner.revive(chunk.start)
            chunk.tokens = []
        self.pruner.settle()
        chunk.history = []

    def _records(self) -> list[ChunkRecord]:
        video, chunk = self._video, self._chunk
        return [] if video is None or chunk is None else records_of(self._videos - 1, video, chunk)

    # ------------------------------------------------------------------------------------------ judgement

    def _steps_to_judge(self, step: Step, phase: Phase, chunk: Chunk, video: Video) -> list[Step]:
        """The calls to replay if the chunk is unstable; none while the probe has nothing to judge yet."""
        if self.probe == "first-step":
            return [step] if phase is Phase.FIRST else []
        if video.streams:
            raise UnsupportedProbeError(
                "probe='candidate' cannot replay a chunk whose guidance branches keep two contexts; "
                "use probe='first-step'"
            )
        if video.waiting and not video.usual_steps:
            # Else nobody would ever read how many steps a chunk has where commits are not seen as such.
            video.learn_steps([bool(flag) for flag in video.waiting])
        chunk.history.append(step)
        return chunk.history if chunk.steps == video.usual_steps else []

    def _remember(self, call: Call, phase: Phase, prediction: Tensor, chunk: Chunk) -> None:
        """Keep the summary of the chunk as last seen; where only the device knows if it was clean, choose there."""
        if phase is Phase.RECACHE:
            return
        if phase is Phase.COMMIT or call.commits:
            chunk.latest = latent_summary(call.latents, self.patch_size)
            # A rolling window commits an older chunk than the one it takes in: not what this chunk's records tell of.
            chunk.latents = call.latents if call.start == chunk.start else chunk.latents
            chunk.given = chunk.given or phase is Phase.FIRST
            return
        chunk.latest, chunk.latents = latent_summary(prediction, self.patch_size), prediction
        for clean in clean_flag(call):
            given = latent_summary(call.latents, self.patch_size).to(chunk.latest.dtype)
            chunk.latest = torch.where(clean, given, chunk.latest)
            chunk.clean.append(clean)


def _is_branch(call: Call, video: Video, chunk: Chunk | None) -> bool:
    """Whether a call of another stream is a second branch of the chunk in progress, not a new video."""
    if chunk is None or call.start != chunk.start or _failed_at_once(video, chunk):
        return False
    return call.stream in video.streams or not chunk.committed


def _failed_at_once(video: Video | None, chunk: Chunk | None) -> bool:
    """Whether a call of the video's first chunk raised: the next call at its frames begins a video anew."""
    return video is not None and chunk is not None and chunk.failed and not video.chunk
