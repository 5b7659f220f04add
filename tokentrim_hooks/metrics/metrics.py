"""Drift metrics of a video that need no downloaded weights.

Frames are ``[T, H, W, 3]``, RGB, float in [0, 1] (uint8 is converted). Every metric is a plain formula of such frames;
its docstring names unit and source. Colour conversion, Laplacian and optical flow are OpenCV's.

Consistency is meaningless without motion beside it: a frozen video is perfectly consistent (see :func:`measure`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.extras import require

Array = npt.NDArray[np.float64]
Frames = npt.NDArray[np.float32]

LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Rec. 709 weights."""
DARK, BRIGHT = 0.02, 0.98
"""A pixel with luma beyond these counts as clipped."""
BINS = 8
"""Histogram bins per colour channel."""


def as_frames(video: npt.NDArray[Any] | Tensor) -> Frames:
    """Return ``[T, H, W, 3]`` float32 in [0, 1] from that, from uint8, or from a tensor ``[T, 3, H, W]``.

    Raises:
        VideoError: another shape, no frame, or values that are not finite.
    """
    array = video.detach().cpu().permute(0, 2, 3, 1).numpy() if isinstance(video, Tensor) else np.asarray(video)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise VideoError(f"frames must be [T, H, W, 3], got shape {array.shape}")
    if not len(array):
        raise VideoError("the video has no frame")
    scaled = array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32)
    if not np.isfinite(scaled).all():
        raise VideoError("the video holds NaN or inf")
    return np.ascontiguousarray(np.clip(scaled, 0, 1))


# ---------------------------------------------------------------------------------------------- colour and sharpness

def luma(frames: Frames) -> Array:
    """Mean luma per frame, ``[T]`` in [0, 1]."""
    return np.asarray(_luma_planes(frames).mean(axis=(1, 2)))


def contrast(frames: Frames) -> Array:
    """RMS contrast per frame: standard deviation of luma, ``[T]``."""
    return np.asarray(_luma_planes(frames).std(axis=(1, 2)))


def clipped(frames: Frames) -> Array:
    """Share of a frame's pixels whose luma is below DARK or above BRIGHT, ``[T]``."""
    planes = _luma_planes(frames)
    return np.asarray(((planes < DARK) | (planes > BRIGHT)).mean(axis=(1, 2)))


def saturation(frames: Frames) -> Array:
    """Mean HSV saturation per frame, ``[T]`` in [0, 1]: (max - min) / max of R, G, B, 0 for black."""
    high, low = frames.max(axis=-1).astype(np.float64), frames.min(axis=-1).astype(np.float64)
    share = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    return np.asarray(share.mean(axis=(1, 2)))


def colourfulness(frames: Frames) -> Array:
    """Hasler and Suesstrunk's colourfulness (2003) per frame, on the 0..255 scale, ``[T]``."""
    red, green, blue = (255.0 * frames[..., c].astype(np.float64) for c in range(3))
    rg, yb = red - green, (red + green) / 2 - blue
    spread = np.hypot(rg.std(axis=(1, 2)), yb.std(axis=(1, 2)))
    return np.asarray(spread + 0.3 * np.hypot(rg.mean(axis=(1, 2)), yb.mean(axis=(1, 2))))


def lab(frames: Frames) -> Array:
    """Mean CIELAB colour per frame (D65), ``[T, 3]``: L* in 0..100, a*, b*."""
    cv2 = require("cv2", "metrics")
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2LAB).mean(axis=(0, 1)) for frame in frames]).astype(np.float64)


def sharpness(frames: Frames) -> Array:
    """Variance of the Laplacian of luma (0..255 scale) per frame, ``[T]``."""
    cv2 = require("cv2", "metrics")
    planes = 255.0 * _luma_planes(frames)
    return np.array([cv2.Laplacian(plane, cv2.CV_64F).var() for plane in planes])


def _luma_planes(frames: Frames) -> Array:
    return np.asarray(frames.astype(np.float64) @ LUMA)


# ---------------------------------------------------------------------------------------------- time

def flicker(frames: Frames) -> float:
    """VBench's temporal flickering: (255 - mean |f_t - f_t+1|) / 255; 1 = no change. 1 for a single frame."""
    if len(frames) < 2:
        return 1.0
    return float(1.0 - np.abs(np.diff(frames.astype(np.float64), axis=0)).mean())


def lag_similarity(frames: Frames, lags: Sequence[int] = (1, 2, 5, 10, 20, 50)) -> dict[int, float]:
    """Mean colour-histogram intersection of frames that are ``lag`` apart, 0..1; lags beyond the video are left out."""
    histograms = np.stack([_histogram(frame) for frame in frames])
    return {
        lag: float(np.minimum(histograms[lag:], histograms[:-lag]).sum(axis=1).mean())
        for lag in lags
        if 0 < lag < len(frames)
    }


def _histogram(frame: Frames) -> Array:
    """Joint RGB histogram with BINS bins per channel, summing to 1."""
    index = np.minimum((frame * BINS).astype(int), BINS - 1)
    flat = (index[..., 0] * BINS + index[..., 1]) * BINS + index[..., 2]
    return np.asarray(np.bincount(flat.ravel(), minlength=BINS**3) / flat.size)


def motion(frames: Frames) -> Array:
    """Mean magnitude of Farneback's optical flow between neighbouring frames, pixels per frame, ``[T-1]``."""
    cv2 = require("cv2", "metrics")
    planes = (255.0 * _luma_planes(frames)).astype(np.uint8)
    flows = (cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0) for a, b in pairwise(planes))
    return np.array([np.linalg.norm(flow, axis=-1).mean() for flow in flows])


def boundary_spike(per_step: Array, period: int, first: int | None = None) -> float:
    """Mean of a per-step series at chunk boundaries over its mean elsewhere; 1 = boundaries do not show.

    Step i lies between frames i and i + 1; boundaries are steps ``first - 1``, ``first - 1 + period``, ... where
    ``first`` (default: ``period``) is the number of frames of the first chunk. NaN where there is nothing to compare.
    """
    start = (period if first is None else first) - 1
    at = np.zeros(len(per_step), dtype=bool)
    at[start::period] = True
    if period < 1 or not at.any() or at.all():
        return float("nan")
    inside = float(per_step[~at].mean())
    return float(per_step[at].mean()) / inside if inside > 0 else float("nan")


# ---------------------------------------------------------------------------------------------- start and end

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
        raise VideoError("cannot contrast the start and end of an empty series")
    size = max(1, min(len(series), round(share * len(series)) if frames is None else frames))
    return Contrast(float(np.mean(series[:size])), float(np.mean(series[-size:])))


def windows(series: Array, count: int) -> Array:
    """Means of ``count`` consecutive windows of nearly equal length (fewer where the series is shorter)."""
    return np.array([part.mean(axis=0) for part in np.array_split(series, min(count, len(series)))])


def colour_shift(frames: Frames, share: float = 0.15) -> float:
    """CIE76 distance between the mean CIELAB colours of the first and last ``share`` of the video."""
    colours = lab(frames)
    size = max(1, round(share * len(colours)))
    return float(np.linalg.norm(colours[-size:].mean(axis=0) - colours[:size].mean(axis=0)))


# ---------------------------------------------------------------------------------------------- all together

SERIES = {
    "luma": luma,
    "saturation": saturation,
    "contrast": contrast,
    "clipped": clipped,
    "colourfulness": colourfulness,
    "sharpness": sharpness,
}
"""Per-frame metrics by name."""


def measure(
    video: npt.NDArray[Any] | Tensor, fps: float = 16.0, period: int | None = None
) -> dict[str, float | dict[int, float]]:
    """All metrics of a video by name.

    For each per-frame metric: its mean, and its start-end contrast over 15 % (``_drift``, ``_drift_abs``) and, for
    videos of at least 10 s, over 5 s (``_drift_5s``). Consistency (``lag_similarity``) stands beside ``motion``.
    ``period`` is the number of frames of a chunk, for ``boundary_spike``.
    """
    frames = as_frames(video)
    result: dict[str, float | dict[int, float]] = {"frames": float(len(frames)), "seconds": len(frames) / fps}
    for name, function in SERIES.items():
        result.update(_contrasts(name, function(frames), fps))
    result["colour_shift"] = colour_shift(frames)
    result["flicker"] = flicker(frames)
    result["lag_similarity"] = lag_similarity(frames)
    moving = motion(frames)
    result["motion"] = float(moving.mean()) if len(moving) else 0.0
    if len(moving):
        result.update(_contrasts("motion", moving, fps))
    if period is not None:
        result["boundary_spike"] = boundary_spike(moving, period)
    return result


def _contrasts(name: str, series: Array, fps: float) -> dict[str, float | dict[int, float]]:
    whole = start_end(series)
    found: dict[str, float | dict[int, float]] = {
        name: float(series.mean()),
        f"{name}_drift": whole.signed,
        f"{name}_drift_abs": whole.absolute,
    }
    if len(series) / fps >= 10:
        found[f"{name}_drift_5s"] = start_end(series, frames=round(5 * fps)).signed
    return found
