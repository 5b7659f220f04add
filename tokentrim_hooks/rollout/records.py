"""From a chunk's state to its records, one per sample, and on to the report and the observers."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Iterable, Sequence

from tokentrim_hooks.report.observers import Observer, progress_line, tell
from tokentrim_hooks.report.record import ChunkRecord, Report
from tokentrim_hooks.rollout.reading import Reading
from tokentrim_hooks.rollout.state import ChunkState, Judgement, VideoState

_logger = logging.getLogger(__name__)


class Recorder:
    """Keeps the report of one patched model and tells its observers."""

    def __init__(self, report: Report, observers: Sequence[Observer] = ()) -> None:
        self.report, self.observers = report, list(observers)
        self._videos = 0
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
        records = records_of(video, chunk)
        with self._lock:
            self.report.records.extend(records)
            if _logger.isEnabledFor(logging.DEBUG):
                _logger.debug("%s", progress_line(records))
            if chunk.latents is not None:
                tell(self.observers, "on_chunk", records, chunk.latents)

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
    record = ChunkRecord(
        video=video.number,
        chunk=video.index,
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
    judgement = chunk.judgement
    if judgement is None or judgement.reading is None:
        return record
    return _judged(record, judgement, judgement.reading, sample)


def _judged(record: ChunkRecord, judgement: Judgement, reading: Reading, sample: int) -> ChunkRecord:
    pruned = reading.prune[sample] and judgement.regenerations > 0
    severity, threshold = float(reading.severity[sample]), float(reading.threshold[sample])
    return dataclasses.replace(
        record,
        severity=severity,
        mean=float(reading.mean[sample]) if reading.count else None,
        std=float(reading.std[sample]) if reading.count else None,
        threshold=threshold if math.isfinite(threshold) else None,
        accepted_severity=severity if judgement.accepted is None else judgement.accepted[sample],
        pruned=pruned,
        tokens=tuple(reading.tokens[sample]),
        drift=tuple(float(f"{value:.4g}") for value in reading.drift[sample].tolist()),
        dead=judgement.dead // sum(reading.prune) if pruned else 0,
        anchors=judgement.anchors if pruned else 0,
        regenerations=judgement.regenerations if pruned else 0,
    )
