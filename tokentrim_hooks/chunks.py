"""What the rollout remembers: of the chunk in progress, of the video, and what one host read brings back."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.adapter import Call, Phase, Seen
from tokentrim_hooks.drift import RunningStatistics
from tokentrim_hooks.policy import History, Verdict
from tokentrim_hooks.report import ChunkRecord


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


@dataclass(frozen=True)
class Reading:
    """One verdict and all that was waiting on the device, read by the host in one go."""

    severity: list[float]
    threshold: list[float]
    mean: list[float]
    std: list[float]
    prune: list[bool]
    tokens: list[list[int]]
    drift: list[list[float]]
    flags: list[bool]
    count: int


def read(verdict: Verdict, drift: Tensor, history: History, flags: list[Tensor]) -> Reading:
    """Bring a verdict, its drift ``[B, N]`` and waiting flags to the host: exactly one synchronisation."""
    severity = verdict.severity
    wide = torch.float32 if severity.device.type == "mps" else torch.float64
    columns = [severity, verdict.threshold, history.mean, history.std, verdict.prune]
    table = torch.stack([column.to(severity.device, wide) for column in columns])
    waiting = [flag.reshape(1).to(severity.device, wide) for flag in flags]
    parts = [table, verdict.tokens.to(wide), drift.to(wide), *waiting]
    values: list[float] = torch.cat([part.flatten() for part in parts]).tolist()
    batch = severity.shape[0]
    rows = [_take(values, batch) for _ in range(5)]
    tokens = [[int(token) for token in _take(values, verdict.tokens.shape[1])] for _ in range(batch)]
    drifts = [_take(values, drift.shape[1]) for _ in range(batch)]
    prune = [bool(value) for value in rows[4]]
    flags_read = [bool(value) for value in values]
    return Reading(rows[0], rows[1], rows[2], rows[3], prune, tokens, drifts, flags_read, history.count)


def _take(values: list[float], count: int) -> list[float]:
    """Remove and return the first ``count`` values."""
    taken = values[:count]
    del values[:count]
    return taken


def records_of(number: int, video: Video, chunk: Chunk) -> list[ChunkRecord]:
    """Records of a chunk, one a sample; ``number`` is the video's ordinal."""
    return [_record(number, video, chunk, sample) for sample in range(video.batch)]


def _record(number: int, video: Video, chunk: Chunk, sample: int) -> ChunkRecord:
    record = ChunkRecord(
        video=number,
        chunk=video.chunk,
        sample=sample,
        start=chunk.start,
        frames=chunk.frames,
        phases=dict(chunk.phases),
        extra_calls=chunk.extra_calls,
        grid=chunk.grid,
        seconds=chunk.ended - chunk.began,
        given=chunk.given,
        notes=tuple(chunk.notes),
    )
    reading = chunk.reading
    return record if reading is None else _judged(record, chunk, reading, sample)


def _judged(record: ChunkRecord, chunk: Chunk, reading: Reading, sample: int) -> ChunkRecord:
    pruned = reading.prune[sample] and chunk.regenerations > 0
    return dataclasses.replace(
        record,
        severity=reading.severity[sample],
        mean=reading.mean[sample] if reading.count else None,
        std=reading.std[sample] if reading.count else None,
        threshold=reading.threshold[sample] if math.isfinite(reading.threshold[sample]) else None,
        accepted_severity=(chunk.accepted or reading.severity)[sample],
        pruned=pruned,
        tokens=tuple(reading.tokens[sample]),
        drift=tuple(float(f"{value:.4g}") for value in reading.drift[sample]),
        dead=chunk.dead // sum(reading.prune) if pruned else 0,
        anchors=chunk.anchors if pruned else 0,
        regenerations=chunk.regenerations if pruned else 0,
    )
