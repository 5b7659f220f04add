"""From a chunk's state to its records, one per sample, and on to the report and the observers."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import threading
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.errors import PolicyError, SessionError
from tokentrim_hooks.pruning.call_scope import executes
from tokentrim_hooks.report.floats import Floats
from tokentrim_hooks.report.observers import Observer, progress_line, tell
from tokentrim_hooks.report.record import ChunkRecord, Report
from tokentrim_hooks.rollout.judgement import Judgement
from tokentrim_hooks.rollout.reading import Reading
from tokentrim_hooks.rollout.scene import Act
from tokentrim_hooks.rollout.state import ChunkState, VideoState

KEPT = 1000
"""Chunks of which a report keeps the drift of every token; of older ones it keeps everything else."""

_logger = logging.getLogger(__name__)


class Recorder:
    """Keeps the report of one patched model and tells its observers.

    Attributes:
        fault: what a record has brought to light, for the next hook to raise.
        telling: while observers are told, the thread that tells them, and its frame, which says whether it still does.
    """

    def __init__(self, report: Report, observers: Sequence[Observer] = ()) -> None:
        self.report, self.observers = report, list(observers)
        self.fault: PolicyError | None = None
        self._videos = 0
        self.telling: tuple[int, FrameType] | None = None
        # Videos that are made at the same time, in several threads, share one report and its observers.
        self._lock = threading.RLock()

    def number_video(self) -> int:
        """Ordinal of a video that begins."""
        with self._lock:
            self._videos += 1
            return self._videos - 1

    def publish(self, video: VideoState | None, chunk: ChunkState | None) -> None:
        """Record a chunk and tell the observers, once: at its commit, or at the next chunk where there is none."""
        if video is None or chunk is None or chunk.published:
            return
        chunk.published = True
        self._read_acts(chunk)
        records = records_of(video, chunk)
        with self._lock:
            self.report.records.extend(records)
            self._shorten(len(records))
            if _logger.isEnabledFor(logging.DEBUG):
                _logger.debug("%s", progress_line(records))
            if chunk.latents is not None:
                self._tell(records, chunk.latents)

    def _tell(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        before, self.telling = self.telling, (threading.get_ident(), sys._getframe())
        try:
            tell(self.observers, "on_chunk", records, latents)
        finally:
            self.telling = before

    def refuse_observers(self) -> None:
        """A call of the model begins.

        Raises:
            SessionError: an observer makes it, amid the video that it is told of.
        """
        telling = self.telling
        if telling is not None and telling[0] == threading.get_ident() and executes(telling[1]):
            raise SessionError(
                "an observer runs the model that it observes, amid a video: that one would end here.\n"
                "Run it when the video is done, or give the observer a model of its own."
            )

    def _read_acts(self, chunk: ChunkState) -> None:
        """Bring what policies did beside judging to the host, in one read, and find numbers that are not finite."""
        waiting = [number for act in chunk.acts for number in (act.norm, act.told) if isinstance(number, Tensor)]
        if not waiting:
            return
        flat = [number.detach().to(waiting[0].device, torch.float32).flatten() for number in waiting]
        read = iter(torch.cat(flat).tolist())
        for place, act in enumerate(chunk.acts):
            norm = [next(read)] if isinstance(act.norm, Tensor) else []
            told = [next(read) for _ in act.told] if act.told is not None else []
            moments = dict(zip(Act.TOLD, told, strict=False))
            chunk.acts[place] = dataclasses.replace(act, norm=norm[0] if norm else act.norm, told=None, moments=moments)
            if self.fault is None and not all(map(math.isfinite, norm + told)):
                self.fault = PolicyError(
                    f"{act.policy}.{act.hook} gave numbers that are not finite for the chunk at latent frame "
                    f"{chunk.start}, or was given such.\nMend it, or leave it out: without it the model shows whether "
                    "it diverged by itself."
                )

    def raise_fault(self) -> None:
        """Raise what records have brought to light, once."""
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def _shorten(self, count: int) -> None:
        """Let go of the drift of ``count`` records, the latest of those that are not to be kept in full."""
        records = self.report.records
        stop = len(records) - KEPT * count
        for place in range(max(stop - count, 0), stop):
            records[place] = dataclasses.replace(records[place], drift=())

    def snapshot(self, underway: Iterable[tuple[VideoState | None, ChunkState | None]]) -> Report:
        """The report so far, unpublished chunks included."""
        report = Report(dict(self.report.settings), list(self.report.records))
        for video, chunk in underway:
            if video is not None and chunk is not None and not chunk.published:
                report.records += records_of(video, chunk)
        return report


def records_of(video: VideoState, chunk: ChunkState) -> list[ChunkRecord]:
    """Records of a chunk, one per sample."""
    return [_record(video, chunk, sample) for sample in range(video.batch)]


def _record(video: VideoState, chunk: ChunkState, sample: int) -> ChunkRecord:
    judgement = chunk.judgement
    reading = None if judgement is None else judgement.reading
    verdict = {} if judgement is None or reading is None else _verdict(judgement, reading, sample)
    return ChunkRecord(
        video=video.number,
        chunk=video.index,
        sample=sample,
        start=chunk.start,
        frames=chunk.frames,
        phases=dict(chunk.phases),
        extra_calls=chunk.extra_calls,
        proof_calls=0 if judgement is None else judgement.proof_calls,
        grid=chunk.grid,
        seconds=chunk.ended - chunk.began,
        given=chunk.given,
        notes=tuple(chunk.notes),
        acts=_acts(chunk, video.batch),
        **verdict,
    )


def _acts(chunk: ChunkState, batch: int) -> tuple[dict[str, Any], ...]:
    """What policies did beside judging, once per policy and hook; rows are those of one sample."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for act in chunk.acts:
        new = {"policy": act.policy, "hook": act.hook, "calls": 0, "rows": 0}
        entry = found.setdefault((act.policy, act.hook), new)
        entry["calls"] += 1
        entry["rows"] += act.rows // batch if act.hook == "hide" else act.rows
        if act.norm is not None:
            norm = float(act.norm)
            # A later call's may be finite again.
            entry["norm"] = norm if math.isfinite(entry.get("norm", 0.0)) else entry["norm"]
        entry.update(act.moments)
    return tuple(found.values())


_numbers: list[int] = []
"""Token numbers, each once: a thousand records name the same ones, and an int of Python takes 28 bytes."""


def _shared(tokens: list[int]) -> tuple[int, ...]:
    """The same numbers, those of :data:`_numbers`."""
    global _numbers
    numbers = _numbers
    if max(tokens, default=-1) >= len(numbers):
        _numbers = numbers = [*range(max(tokens) + 1)]  # a new list: other threads may be at this, too
    return tuple(map(numbers.__getitem__, tokens))


def _memory(values: Tensor) -> bytearray:
    """Numbers as float32 in this machine's byte order; not by way of NumPy, which torch does without."""
    memory = bytearray(4 * values.numel())
    if not memory:  # a rank without an opinion of its own has no drift
        return memory
    torch.frombuffer(memory, dtype=torch.float32).copy_(values.flatten())
    return memory


def _verdict(judgement: Judgement, reading: Reading, sample: int) -> dict[str, Any]:
    """What a record says of the judgement of a sample."""
    pruned = reading.prune[sample] and judgement.regenerations > 0
    severity, threshold = reading.severity[sample], reading.threshold[sample]
    accepted = judgement.accepted or reading
    return {
        "severity": severity,
        "mean": reading.mean[sample] if reading.count else None,
        "std": reading.std[sample] if reading.count else None,
        "threshold": threshold if math.isfinite(threshold) else None,
        "accepted_severity": accepted.severity[sample],
        "watched": None if reading.watched is None else reading.watched[sample],
        "accepted_watched": None if accepted.watched is None else accepted.watched[sample],
        "pruned": pruned,
        "tokens": _shared(reading.tokens[sample]),
        "drift": Floats.packed(_memory(reading.drift[sample])),
        "dead": judgement.dead // sum(reading.prune) if pruned else 0,
        "anchors": judgement.anchors if pruned else 0,
        "regenerations": judgement.regenerations if pruned else 0,
    }
