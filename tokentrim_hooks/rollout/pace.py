"""How many denoising calls a chunk takes, where chunks differ: then its last one is known by its timestep.

As long as chunks take equally many, their number tells which call is the last and which one commits, and nothing is
read from the device. A sampler with other numbers of steps from chunk to chunk shows that once, in a chunk that is over
too early or goes on too long; from then on the timesteps of its calls are read.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor

from tokentrim_hooks.adapter import Call, Phase
from tokentrim_hooks.errors import TokenTrimWarning
from tokentrim_hooks.inspection import shares_storage
from tokentrim_hooks.rollout.state import ChunkState, VideoState, noisy_flag


@dataclass
class Habits:
    """What was seen of a patched model's samplers, in all its videos.

    Attributes:
        varies: whether chunks were seen that take different numbers of denoising calls, and no adapter said so.
    """

    varies: bool = False


class Pace:
    """Of one session, from video to video.

    Args:
        habits: of the model.
        candidate: whether the last call's prediction is judged, so that a chunk whose last call is not known is missed.
        rolls: whether several chunks are in flight: then they take fewer calls while the window fills, by design.
    """

    def __init__(self, habits: Habits, candidate: bool, rolls: bool = False) -> None:
        self._habits, self._candidate, self._rolls = habits, candidate, rolls
        self._end = math.inf
        self._latest: list[list[Tensor | float]] = []

    def begin_video(self) -> None:
        """Videos may end their chunks at other timesteps."""
        self._end, self._latest = math.inf, []

    def usual(self, video: VideoState, chunk: ChunkState | None) -> int:
        """Denoising calls of this chunk: what its adapter says, else those of a chunk before; 0 if not known."""
        said = 0 if chunk is None else chunk.said
        return said or (0 if self._habits.varies else video.usual_steps)

    def is_last(self, chunk: ChunkState, usual_steps: int) -> bool:
        """Whether the latest denoising call is the chunk's last one; not known, so False, before one is complete.

        Where chunks differ: whether it is the first of the chunk to come down to where the lowest of them have ended.
        """
        if chunk.said or not self._habits.varies or not chunk.levels:
            return chunk.is_last(usual_steps)
        levels = _read(chunk.levels)
        return levels[-1] <= self._end < min([math.inf, *levels[:-1]]) if math.isfinite(self._end) else False

    def phase(self, phase: Phase, call: Call, video: VideoState | None, chunk: ChunkState | None) -> Phase:
        """``phase`` where numbers have told it, once more by the call's timestep if they have been seen to differ."""
        if video is None or chunk is None:
            return phase
        if phase is Phase.FIRST and self._was_no_commit(call, chunk):
            chunk.take_back_commit()
            self.differ(chunk.steps, video.usual_steps)
            phase = Phase.REFINE
        noisy = noisy_flag(call) if self._habits.varies and phase is Phase.REFINE else None
        if noisy is not None and not noisy:
            return Phase.COMMIT
        if phase is Phase.COMMIT and not call.commits and not shares_storage(call.latents, video.returned):
            chunk.guessed = call.timestep
        return phase

    def _was_no_commit(self, call: Call, chunk: ChunkState) -> bool:
        """Whether a commit that only its number told was a denoising call, as a further call of the chunk suggests."""
        return chunk.guessed is not None and call.start == chunk.start and bool(chunk.guessed.any())

    def begins_anew(self, call: Call, chunk: ChunkState, left: bool = False) -> bool:
        """Whether a denoising call at the chunk's frames is no quieter than its first one was. Reads the device.

        Some samplers call twice at a step, with the same latents; ``left`` says that it cannot be such a call.
        """
        if self._rolls or call.timestep is None or not chunk.levels or chunk.committed:
            return False
        noisiest = chunk.levels[0]
        if call.timestep.amax() < (noisiest.amax() if isinstance(noisiest, Tensor) else noisiest):
            return False
        if left or not shares_storage(call.latents, chunk.noisy):
            return True
        levels = _read(chunk.levels)
        return min(levels) < levels[0]  # then it is no second call of the first step either

    def learn(self, video: VideoState, chunk: ChunkState) -> None:
        """A chunk is over, and its last denoising call is known."""
        expected = chunk.said or video.usual_steps
        if chunk.failed or chunk.given or not chunk.steps:
            return
        if expected and chunk.steps != expected:
            self.differ(chunk.steps, expected)
        if self._habits.varies:
            self._fold()

    def keep(self, chunk: ChunkState) -> None:
        """Remember at which timesteps a chunk was called that is over, and those of the one before."""
        if not self._latest or self._latest[-1] is not chunk.levels:
            self._latest = [*self._latest[-1:], chunk.levels]

    def _fold(self) -> None:
        """Where the lowest of the latest chunks has ended; a clean call is none of denoising."""
        self._end = min([self._end, *(level for levels in self._latest for level in _read(levels) if level > 0)])

    def differ(self, steps: int, expected: int) -> None:
        """Two chunks have taken different numbers of denoising calls."""
        if self._rolls:
            return
        told, self._habits.varies = self._habits.varies, True
        self._fold()
        if self._candidate and not told:
            warnings.warn(
                f"chunks take different numbers of denoising calls ({expected}, then {steps}): one was judged early, "
                "or not.\nFrom now on timesteps tell; to be sure, override Adapter.steps, or use probe='first-step'.",
                TokenTrimWarning,
                stacklevel=2,
            )

    def note(self, video: VideoState, chunk: ChunkState) -> None:
        """Say in the chunk's records that its last call was not judged, where that call was not known as such."""
        wanted = self._candidate and video.index > 0 and (chunk.said or video.usual_steps)
        if not wanted or chunk.failed or chunk.given or chunk.published or chunk.judged_at == chunk.steps:
            return
        when = f"judged at its denoising call {chunk.judged_at}" if chunk.judged_at else "not judged"
        chunk.notes.append(f"{when}: it took {chunk.steps} calls, unlike the chunks before")


def _read(levels: list[Tensor | float]) -> list[float]:
    """Timesteps as numbers, the noisiest frame's; in place, so that each is read once."""
    levels[:] = [float(level.amax()) if isinstance(level, Tensor) else level for level in levels]
    return [float(level) for level in levels]
