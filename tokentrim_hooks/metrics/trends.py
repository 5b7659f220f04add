"""How a series of numbers, one per frame, changes from the start of a video to its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.metrics.frames import Array

WINDOWS = 8
"""Windows of a video at most, whose means make its drift per minute; each is at least a second long."""


@dataclass(frozen=True)
class Contrast:
    """How a metric differs between the end and the start of a video: ``end - start``, signed and absolute."""

    start: float
    end: float

    @property
    def signed(self) -> float:
        """End minus start."""
        return self.end - self.start

    @property
    def absolute(self) -> float:
        """Size of the difference (FramePack's delta, equation 7)."""
        return abs(self.signed)


def start_end(series: Array, share: float = 0.15, frames: int | None = None) -> Contrast:
    """Contrast of the first and last ``share`` of a series (FramePack: 15 %), or of so many ``frames`` (5 s, say)."""
    if not len(series):
        raise VideoError("cannot contrast the start and end of an empty series; give values")
    size = max(1, min(len(series), round(share * len(series)) if frames is None else frames))
    return Contrast(float(np.mean(series[:size])), float(np.mean(series[-size:])))


def windows(series: Array, count: int) -> Array:
    """Means of ``count`` consecutive windows of nearly equal length (fewer where the series is shorter)."""
    return np.array([part.mean(axis=0) for part in np.array_split(series, min(count, len(series)))])


@dataclass(frozen=True)
class Drift:
    """How fast a metric changes, and the means that say so.

    Attributes:
        per_minute: slope of the least-squares line through the means of the windows, in the metric's unit per minute;
            NaN for a video of less than two seconds.
        windows: the means, in order of time. seconds: the length of a window.
    """

    per_minute: float
    windows: tuple[float, ...]
    seconds: float


def drift(series: Array, fps: float) -> Drift:
    """Drift per minute of a series with one value per frame: of a second of it, so too short a video has none."""
    count = min(WINDOWS, int(len(series) / fps))
    means = windows(series, max(count, 1))
    middles = windows(np.arange(len(series)) / (60 * fps), max(count, 1))
    slope = math.nan if count < 2 else float(np.polyfit(middles, means, 1)[0])
    return Drift(slope, tuple(map(float, means)), len(series) / fps / max(count, 1))
