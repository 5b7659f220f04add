"""All metrics of a video in one pass: frames come one by one, and none is kept but the latest."""

from __future__ import annotations

import array
import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.metrics.frames import Array, Frames, as_frames, one_by_one
from tokentrim_hooks.metrics.metrics import (
    LAGS,
    OF_LUMA,
    SERIES,
    boundary_spike,
    change_between,
    grey_of,
    histogram,
    lab,
    luma_planes,
    motion_between,
    reduction,
    shift_of,
)
from tokentrim_hooks.metrics.trends import Drift, drift, start_end

Measures = dict[str, float | dict[int, float]]
LONG = 10
"""Seconds from which on a video's first and last five seconds are compared, too."""


def measure(video: npt.NDArray[Any] | Tensor, fps: float = 16.0, period: int | None = None) -> Measures:
    """All metrics of a video by name, see :meth:`Meter.values`.

    Args:
        video: as :func:`~tokentrim_hooks.metrics.frames.as_frames` takes it. fps: its frames per second.
        period: the number of frames of a chunk, for ``boundary_spike``.

    Raises:
        VideoError: it is no video.
    """
    return metered(as_frames(video), fps, period).values()


def metered(frames: Iterable[npt.NDArray[Any]], fps: float = 16.0, period: int | None = None) -> Meter:
    """A meter that has seen all ``frames``, each ``[H, W, 3]`` (uint8, or float in [0, 1]) and of one size.

    Raises:
        VideoError: no frame, or one that is none.
    """
    meter = Meter(fps, period)
    for frame in one_by_one(frames):
        meter.add(frame)
    if not len(meter):
        raise VideoError("the video has no frame; give one that plays")
    return meter


class Meter:
    """Measures a video while it is read.

    It keeps eleven numbers per frame (88 bytes: 15 MB for two hours), the latest frame, and the colour histograms of
    the latest fifty.

    Attributes:
        series: one number per frame by name, and per step from one frame to the next for ``motion`` and ``change``
            (mean absolute difference of pixels).
    """

    def __init__(self, fps: float = 16.0, period: int | None = None) -> None:
        if not fps > 0 or not math.isfinite(fps):
            raise VideoError(f"frames per second must be above 0, got {fps!r}")
        self.fps, self.period = fps, period
        self.series = {name: array.array("d") for name in (*SERIES, "L", "a", "b", "motion", "change")}
        self._latest: tuple[Frames, npt.NDArray[np.uint8]] | None = None
        self._histograms: deque[Array] = deque(maxlen=max(LAGS))
        self._alike = dict.fromkeys(LAGS, 0.0)

    def __len__(self) -> int:
        return len(self.series["luma"])

    def add(self, frame: Frames) -> None:
        """Measure one more frame, ``[H, W, 3]``, float32 in [0, 1]."""
        frames = frame[None]
        planes = luma_planes(frames)
        for name, function in SERIES.items():
            found = OF_LUMA[name](planes) if name in OF_LUMA else function(frames)
            self.series[name].append(float(found[0]))
        for name, value in zip("Lab", lab(frames)[0], strict=True):
            self.series[name].append(float(value))
        self._compare_colours(histogram(frame))
        plane = grey_of(planes)[0]
        if self._latest is not None:
            before, plane_before = self._latest
            self.series["change"].append(change_between(frame, before))
            self.series["motion"].append(reduction(frame.shape[:2]) * motion_between(plane_before, plane))
        self._latest = frame, plane

    def _compare_colours(self, now: Array) -> None:
        for lag in LAGS:
            if lag <= len(self._histograms):
                self._alike[lag] += float(np.minimum(now, self._histograms[-lag]).sum())
        self._histograms.append(now)

    def values(self) -> Measures:
        """All metrics by name.

        For each per-frame metric and for motion: its mean, its start-end contrast over 15 % (``_drift``,
        ``_drift_abs``), for videos of at least 10 s also that over 5 s (``_drift_5s``), and its drift per minute
        (``_per_minute``). Consistency (``lag_similarity``) stands beside ``motion``.
        """
        frames, moving = len(self), self._array("motion")
        found: Measures = {"frames": float(frames), "seconds": frames / self.fps}
        for name in SERIES:
            found.update(self._trend(name))
        found["colour_shift"] = shift_of(np.stack([self._array(name) for name in "Lab"], axis=1))
        found["flicker"] = 1.0 - float(self._array("change").mean()) if frames > 1 else 1.0
        found["lag_similarity"] = {lag: self._alike[lag] / (frames - lag) for lag in LAGS if lag < frames}
        found["motion"] = float(moving.mean()) if len(moving) else 0.0
        found.update(self._trend("motion") if len(moving) else {})
        if self.period is not None:
            found["boundary_spike"] = boundary_spike(moving, self.period)
        return found

    def drifts(self) -> dict[str, Drift]:
        """Drift per minute of each per-frame metric and of motion, with the windows that made it."""
        named = (*SERIES, "motion") if len(self) > 1 else SERIES
        return {name: drift(self._array(name), self.fps) for name in named}

    def _trend(self, name: str) -> Measures:
        series = self._array(name)
        whole = start_end(series)
        found: Measures = {
            name: float(series.mean()),
            f"{name}_drift": whole.signed,
            f"{name}_drift_abs": whole.absolute,
        }
        if len(series) / self.fps >= LONG:
            found[f"{name}_drift_5s"] = start_end(series, frames=round(5 * self.fps)).signed
        slope = drift(series, self.fps).per_minute
        return found if math.isnan(slope) else {**found, f"{name}_per_minute": slope}

    def _array(self, name: str) -> Array:
        return np.array(self.series[name])
