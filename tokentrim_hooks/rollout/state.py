"""What the rollout remembers: of the chunk in progress, and of the video."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokentrim_hooks.adapter import Call, Phase, Seen
from tokentrim_hooks.policy.base import History
from tokentrim_hooks.policy.drift import RunningStatistics
from tokentrim_hooks.rollout.reading import Reading


@dataclass
class Step:
    """A denoising call kept for a whole-chunk replay."""

    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor


@dataclass
class Chunk:
    """The chunk in progress."""

    start: int
    frames: int
    grid: tuple[int, int]
    phases: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    committed: bool = False
    given: bool = False
    latest: Tensor | None = None
    """Summary of the chunk as last seen; becomes the next chunk's predecessor."""
    latents: Tensor | None = None
    """The chunk as last seen, for observers; a reference, not a copy."""
    published: bool = False
    failed: bool = False
    """Whether a call of the chunk raised."""
    clean: list[Tensor] = field(default_factory=list)
    """Per call whose kind only the device knows: whether its latents were clean."""
    reading: Reading | None = None
    accepted: list[float] | None = None
    tokens: list[list[int]] = field(default_factory=list)
    """Tokens to prune per sample; empty lists spare a sample; empty while nothing is pruned."""
    applied: set[Hashable] = field(default_factory=set)
    """Streams whose context has been pruned for this chunk."""
    dead: int = 0
    anchors: int = 0
    """Frames of the context that a prune for this chunk spared as sinks or anchors."""
    regenerations: int = 0
    extra_calls: int = 0
    history: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    ended: float = field(default_factory=time.perf_counter)

    def count(self, phase: Phase) -> None:
        """Note a call of the sampler."""
        self.phases[phase.value] = self.phases.get(phase.value, 0) + 1
        self.steps += phase in (Phase.FIRST, Phase.REFINE)
        self.committed = self.committed or phase is Phase.COMMIT
        self.ended = time.perf_counter()


@dataclass
class Video:
    """What belongs to one video: reset when a new one starts."""

    stream: Hashable
    batch: int
    statistics: RunningStatistics
    streams: set[Hashable] = field(default_factory=set)
    previous: Tensor | None = None
    chunk: int = 0
    usual_steps: int = 0
    returned: Tensor | None = None
    waiting: list[Tensor] = field(default_factory=list)
    """Flags of the previous chunk's calls that wait for the next host read."""

    def learn_steps(self, clean: list[bool]) -> None:
        """The waiting flags were read: calls of the previous chunk with noisy latents are its denoising steps."""
        self.usual_steps = clean.count(False) or self.usual_steps
        self.waiting = []

    def history(self) -> History:
        """Accepted chunks so far, for the policy."""
        return History(self.chunk, self.statistics.count, self.statistics.mean, self.statistics.std)

    def seen(self, chunk: Chunk | None) -> Seen:
        """What the adapter may know when it tells phases apart."""
        if chunk is None:
            return Seen()
        return Seen(
            chunk.start,
            chunk.start + chunk.frames,
            chunk.steps,
            self.usual_steps,
            chunk.committed,
            self.returned,
        )
