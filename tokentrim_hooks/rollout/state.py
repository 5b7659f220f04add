"""What a session, its only writer, remembers: of the chunk in progress and of the video."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.adapter import Call, Phase, Seen
from tokentrim_hooks.policy.drift import RunningStatistics, Summary
from tokentrim_hooks.policy.views import History, Place
from tokentrim_hooks.report.record import BROKEN_OFF
from tokentrim_hooks.rollout.judgement import Judgement
from tokentrim_hooks.rollout.repeat.recall import Course
from tokentrim_hooks.rollout.scene import Act, Scene


@dataclass
class Step:
    """A denoising call kept for a replay: its arguments before other people's hooks; what counted in its course."""

    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor
    place: Place | None = None
    course: Course | None = None


@dataclass
class ChunkState:
    """The chunk in progress.

    Attributes:
        start, frames: its latent frames. grid: (height, width) of its tokens.
        phases: the sampler's calls by phase. steps: denoising calls among them. said: how many of these the adapter
            says that there will be; 0 where it leaves that to the chunks before.
        committed: a commit call was seen. given: it was handed in as clean context.
        summary: latent summary of the chunk as last seen; becomes the next chunk's ``previous``.
        put_off: the chunk was seen again since its summary was made.
        latents: the chunk as last seen, for observers; a reference, not a copy.
        published: its records are out. failed: a call of it raised.
        flags: per call whose kind only the device knows, whether its latents were noisy (:func:`noisy_flag`).
        flag: the same of the call in progress, where judging has asked for it.
        levels: timesteps of its denoising calls; numbers where they were read.
        guessed: timestep of a commit that was told by nothing but the number of calls; None else.
        judged_at: which of its denoising calls was judged; 0 before.
        judgement: what came of judging it; None before.
        pruned_streams: streams whose context has been pruned for it.
        history: its calls so far, for a replay of all of them.
        phase: of the latest judged call. earlier: predictions that policies are to be shown again.
        acts: what policies did beside judging.
        noisy: latents that the latest judged call was given, by which another branch of guidance is known.
        heard: streams that have called since.
        began, ended: seconds, of the first and the last call.
    """

    start: int
    frames: int
    grid: tuple[int, int]
    said: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    committed: bool = False
    given: bool = False
    summary: Summary | None = None
    put_off: bool = False
    latents: Tensor | None = None
    published: bool = False
    failed: bool = False
    flags: list[Tensor] = field(default_factory=list)
    flag: Tensor | None = None
    levels: list[Tensor | float] = field(default_factory=list)
    guessed: Tensor | None = None
    judged_at: int = 0
    judgement: Judgement | None = None
    pruned_streams: set[Hashable] = field(default_factory=set)
    history: list[Step] = field(default_factory=list)
    phase: str = Phase.FIRST.value
    earlier: list[Tensor] = field(default_factory=list)
    acts: list[Act] = field(default_factory=list)
    noisy: Tensor | None = None
    heard: set[Hashable] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    ended: float = field(default_factory=time.perf_counter)

    def fail(self) -> None:
        """A call of the chunk has not come back."""
        self.failed = True
        if BROKEN_OFF not in self.notes:
            self.notes.append(BROKEN_OFF)

    def hear(self, call: Call, judged: bool) -> None:
        """A call of the chunk begins: of the judged stream, or of another branch."""
        if judged:
            self.noisy, self.heard, self.flag = call.latents, set(), None
        else:
            self.heard.add(call.stream)

    def awaits_pruning(self, call: Call) -> bool:
        """Whether a call is the first of another branch, while this chunk was pruned."""
        return bool(self.tokens) and call.stream not in self.pruned_streams and call.start == self.start

    def make_up_for(self, call: Call, phase: Phase) -> None:
        """Count a call that was taken for another video's when it was made."""
        self.hear(call, judged=True)
        self.count(phase, call)
        self._keep_flag(call)

    def count(self, phase: Phase, call: Call) -> None:
        """Note a call of the sampler."""
        self.phase = word = phase._value_  # .value goes by way of two functions
        self.phases[word] = self.phases.get(word, 0) + 1
        if phase in (Phase.FIRST, Phase.REFINE):
            self.steps += 1
            self.levels += [] if call.timestep is None else [call.timestep]
        self.committed = self.committed or phase is Phase.COMMIT
        self.ended = time.perf_counter()

    def take_back_commit(self) -> None:
        """The commit that was guessed was one more denoising call."""
        assert self.guessed is not None, "only a guess is taken back"
        self.levels.append(self.guessed)
        self.steps, self.committed, self.guessed = self.steps + 1, False, None
        self.phases[Phase.REFINE.value] = self.phases.get(Phase.REFINE.value, 0) + 1
        del self.phases[Phase.COMMIT.value]

    def is_last(self, usual_steps: int) -> bool:
        """Whether the latest denoising call is the chunk's last one by number; False before one is complete."""
        return usual_steps > 0 and self.steps == (self.said or usual_steps)

    def copied(self, latents: Tensor) -> Tensor:
        """The chunk as last seen, a copy, for the sampler may write over it; of one that was handed in, that itself."""
        if self.steps == 1 and self.flags and self.noisy is not None:
            return torch.where(self.flags[-1], latents, self.noisy.to(latents.dtype))
        return latents.clone()

    def summary_at_end(self, patch_size: tuple[int, int]) -> Summary | None:
        """Summary of the chunk as last seen, where that was put off until the end."""
        if self.put_off and self.latents is not None:
            self.put_off = False
            self.summary = Summary.of(self.latents, patch_size)
            if self.flags and not self.committed and self.noisy is not None:
                # A chunk that took fewer steps than usual: its last call may have been its commit.
                self.summary = _chosen(self.flags[-1], self.noisy, self.summary, patch_size)
        return self.summary

    def remember(
        self,
        call: Call,
        phase: Phase,
        prediction: Tensor,
        summary: Summary | None,
        patch_size: tuple[int, int],
        passing: bool = False,
    ) -> None:
        """Keep the chunk as last seen; where only the device knows whether it was clean, choose there.

        Args:
            call, phase: the call that has come back.
            prediction: its x0, ``[B, F, C, H, W]``.
            summary: latent summary of ``prediction``, where it was made already.
            patch_size: (height, width) of a token in latent pixels.
            passing: whether a later call of the chunk is expected, so that no summary is made of this one.
        """
        if phase is Phase.RECACHE:
            return
        if phase is Phase.COMMIT or call.commits:
            self.put_off = False
            self.summary = Summary.of(call.latents, patch_size)
            # A rolling window commits an older chunk than the one it takes in: not what this chunk's records tell of.
            self.latents = call.latents if call.start == self.start else self.latents
            self.given = self.given or phase is Phase.FIRST
            return
        self.latents, self.put_off = prediction, passing
        noisy = self._keep_flag(call)
        if passing:
            return
        self.summary = Summary.of(prediction, patch_size) if summary is None else summary
        if noisy is not None:
            self.summary = _chosen(noisy, call.latents, self.summary, patch_size)

    def _keep_flag(self, call: Call) -> Tensor | None:
        """Keep whether the call's latents were noisy, where only the device knows; returns that."""
        noisy, self.flag = noisy_flag(call) if self.flag is None else self.flag, None
        self.flags += [] if noisy is None else [noisy]
        return noisy

    @property
    def tokens(self) -> list[list[int]]:
        """Tokens that were pruned for this chunk, per sample; no list at all if none were."""
        return [] if self.judgement is None else self.judgement.tokens

    @property
    def extra_calls(self) -> int:
        """Denoiser calls that judging cost."""
        return 0 if self.judgement is None else self.judgement.extra_calls


@dataclass
class VideoState:
    """What belongs to one video: made anew when the next one starts.

    Attributes:
        number: ordinal of the video among all of this patched model.
        stream: key of the context whose calls are judged. streams: those of its other guidance branches.
        unsure: first calls of those of them that may yet turn out to be another video's.
        batch: number of samples. index: ordinal of the chunk in progress.
        statistics: of the severities accepted so far.
        previous: latent summary of the previous chunk as accepted.
        first: the same of the scene's first chunk. scene: more of it, for policies that ask.
        usual_steps: denoising calls of an earlier complete chunk; 0 while unknown.
        cut: a re-cache was seen since the latest chunk began.
        told: whether the chunk before this one was handed over as it was accepted, by the call itself.
        returned: the latest prediction that the sampler was handed.
        waiting: flags of the previous chunk's calls, on the device, until something is read anyway.
    """

    number: int
    stream: Hashable
    batch: int
    statistics: RunningStatistics
    streams: set[Hashable] = field(default_factory=set)
    unsure: dict[Hashable, Call] = field(default_factory=dict)
    previous: Summary | None = None
    first: Summary | None = None
    scene: Scene = field(default_factory=Scene)
    index: int = 0
    usual_steps: int = 0
    cut: bool = False
    told: bool = False
    returned: Tensor | None = None
    waiting: list[Tensor] = field(default_factory=list)

    def begin_scene(self) -> None:
        """A prompt switch, a cut or a re-cache: what came before is no measure for what follows."""
        mean = self.statistics.mean
        self.statistics = RunningStatistics.empty(self.batch, mean.device, self.statistics.keep)
        self.first, self.scene, self.cut = None, Scene(), False

    def accept(self, summary: Summary | None) -> None:
        """The chunk in progress is accepted: it is the next one's predecessor."""
        self.previous = summary if summary is not None else self.previous
        self.first = self.previous if self.first is None else self.first
        self.index += 1

    def learn_steps(self, clean: list[bool]) -> None:
        """The waiting flags were read: calls of the previous chunk with noisy latents are its denoising steps."""
        self.usual_steps = clean.count(False) or self.usual_steps
        self.waiting = []

    def history(self) -> History:
        """Accepted severities, for the policy."""
        statistics = self.statistics
        recent = statistics.recent if statistics.count else None
        return History(statistics.count, statistics.mean, statistics.std, recent)

    def seen(self, chunk: ChunkState | None, usual_steps: int) -> Seen:
        """What the adapter may know when it tells phases apart."""
        if chunk is None:
            return Seen()
        return Seen(
            start=chunk.start,
            end=chunk.start + chunk.frames,
            steps=chunk.steps,
            usual_steps=usual_steps,
            committed=chunk.committed,
            returned=self.returned,
        )

    def has_branch(self, call: Call, chunk: ChunkState | None) -> bool:
        """Whether a call of another stream is a second branch of the chunk in progress, not a new video."""
        if call.stream == self.stream or chunk is None or call.start != chunk.start or self.failed_at_once(chunk):
            return False
        return call.stream in self.streams or not chunk.committed

    def failed_at_once(self, chunk: ChunkState | None) -> bool:
        """Whether a call of the video's first chunk raised: the next call at its frames begins a video anew."""
        return chunk is not None and chunk.failed and not self.index


def _chosen(noisy: Tensor, given: Tensor, seen: Summary, patch_size: tuple[int, int]) -> Summary:
    """Summary of what was made of a call's prediction if that was noisy, else of what the call was given."""
    mean = Summary.of(given, patch_size).mean
    return Summary(torch.where(noisy, seen.mean, mean.to(seen.mean.dtype)), patch_size)


def noisy_flag(call: Call) -> Tensor | None:
    """Whether some frame of the call's latents is noisy, on the device; None where its arguments say so anyway.

    Not whether they are clean (timestep 0 everywhere), which is one operation more, at every call.
    """
    if call.commits is not None or call.timestep is None:
        return None
    return call.timestep.any()
