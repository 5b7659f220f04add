"""From a chunk's state to its records, one per sample."""

from __future__ import annotations

import dataclasses
import math

from tokentrim_hooks.report.record import ChunkRecord
from tokentrim_hooks.rollout.reading import Reading
from tokentrim_hooks.rollout.state import Chunk, Video


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
