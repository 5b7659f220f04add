"""Which chunks were judged before their policy had seen enough severities to prune by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokentrim_hooks.report.record import ChunkRecord


def least_of(settings: Mapping[str, Any]) -> int:
    """Severities that the policy waits for, by a run's settings, which may hold anything; 0 where they do not say."""
    warmup = settings.get("policy.warmup")
    return warmup if type(warmup) is int and warmup > 0 else 0


def is_above(record: ChunkRecord) -> bool:
    """Whether the chunk's severity exceeded the threshold at the first judgement."""
    return record.severity is not None and record.threshold is not None and record.severity > record.threshold


class WarmUp:
    """Counts the severities of each sample since its statistics began: with a video, or with a scene."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._least = least_of(settings)
        self._seen: dict[int, int] = {}

    def holds(self, record: ChunkRecord) -> bool:
        """Whether a chunk was judged in the warm-up; to be asked of every record of a run, in order."""
        if record.severity is None:
            return False
        seen = 0 if record.threshold is None else self._seen.get(record.sample, 0)  # no threshold: nothing seen yet
        self._seen[record.sample] = seen + 1
        return record.threshold is None or seen < self._least
