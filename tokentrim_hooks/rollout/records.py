"""From a chunk's state to its records, one per sample, and on to the report and the observers."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from tokentrim_hooks.report.observers import Observer, progress_line, tell
from tokentrim_hooks.report.record import ChunkRecord, Report
from tokentrim_hooks.rollout.reading import Reading
from tokentrim_hooks.rollout.state import ChunkState, Judgement, VideoState

_logger = logging.getLogger(__name__)


class Recorder:
    """Keeps the report of one patched model and tells its observers."""

    def __init__(self, report: Report, observers: Sequence[Observer] = ()) -> None:
        self.report, self.observers = report, list(observers)

    def publish(self, video_index: int, video: VideoState | None, chunk: ChunkState | None) -> None:
        """Record a chunk and tell the observers, once: at its commit, or at the next chunk where there is none."""
        if video is None or chunk is None or chunk.published:
            return
        chunk.published = True
        records = records_of(video_index, video, chunk)
        self.report.records.extend(records)
        if _logger.isEnabledFor(logging.DEBUG):
            _logger.debug("%s", progress_line(records))
        if chunk.latents is not None:
            tell(self.observers, "on_chunk", records, chunk.latents)

    def snapshot(self, video_index: int, video: VideoState | None, chunk: ChunkState | None) -> Report:
        """The report so far, an unpublished chunk included."""
        report = Report(dict(self.report.settings), list(self.report.records))
        if video is not None and chunk is not None and not chunk.published:
            report.records += records_of(video_index, video, chunk)
        return report


def records_of(video_index: int, video: VideoState, chunk: ChunkState) -> list[ChunkRecord]:
    """Records of a chunk, one per sample; ``video_index`` is the video's ordinal."""
    return [_record(video_index, video, chunk, sample) for sample in range(video.batch)]


def _record(video_index: int, video: VideoState, chunk: ChunkState, sample: int) -> ChunkRecord:
    record = ChunkRecord(
        video=video_index,
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
