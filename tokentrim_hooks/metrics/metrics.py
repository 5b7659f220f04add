"""Drift metrics of frames that need no downloaded weights.

Frames are ``[T, H, W, 3]``, RGB, float in [0, 1]. Every metric is a plain formula of such frames; its docstring names
unit and source. Colour conversion, Laplacian and optical flow are OpenCV's.

Consistency is meaningless without motion beside it: a frozen video is perfectly consistent (see :mod:`.meter`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tokentrim_hooks.extras import require
from tokentrim_hooks.metrics.frames import Array, Frames

LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Rec. 709 weights."""
DARK, BRIGHT = 0.02, 0.98
"""A pixel with luma beyond these counts as clipped."""
BINS = 8
"""Histogram bins per colour channel."""
LAGS = (1, 2, 5, 10, 20, 50)
"""Distances of frames that are compared, in frames."""


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


def lag_similarity(frames: Frames, lags: Sequence[int] = LAGS) -> dict[int, float]:
    """Mean colour-histogram intersection of frames that are ``lag`` apart, 0..1; lags beyond the video are left out."""
    histograms = np.stack([histogram(frame) for frame in frames])
    return {
        lag: float(np.minimum(histograms[lag:], histograms[:-lag]).sum(axis=1).mean())
        for lag in lags
        if 0 < lag < len(frames)
    }


def histogram(frame: Frames) -> Array:
    """Joint RGB histogram with BINS bins per channel, summing to 1."""
    index = np.minimum((frame * BINS).astype(int), BINS - 1)
    flat = (index[..., 0] * BINS + index[..., 1]) * BINS + index[..., 2]
    return np.asarray(np.bincount(flat.ravel(), minlength=BINS**3) / flat.size)


def motion(frames: Frames) -> Array:
    """Mean magnitude of Farneback's optical flow between neighbouring frames, pixels per frame, ``[T-1]``."""
    return np.array([motion_between(a, b) for a, b in pairwise(grey(frames))])


def grey(frames: Frames) -> npt.NDArray[np.uint8]:
    """Luma planes as optical flow takes them, ``[T, H, W]`` in 0..255."""
    return (255.0 * _luma_planes(frames)).astype(np.uint8)


def motion_between(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Mean magnitude of Farneback's optical flow between two planes of :func:`grey`, in pixels."""
    cv2 = require("cv2", "metrics")
    flow = cv2.calcOpticalFlowFarneback(one, other, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    return float(np.linalg.norm(flow, axis=-1).mean())


def boundary_spike(per_step: Array, period: int, first: int | None = None) -> float:
    """Mean of a per-step series at chunk boundaries over its mean elsewhere; 1 = boundaries do not show.

    Step i lies between frames i and i + 1; boundaries are steps ``first - 1``, ``first - 1 + period``, ... where
    ``first`` (default: ``period``) is the number of frames of the first chunk. NaN where there is nothing to compare.
    """
    at = np.zeros(len(per_step), dtype=bool)
    if period >= 1:
        at[(period if first is None else first) - 1 :: period] = True
    if not at.any() or at.all():
        return float("nan")
    inside = float(per_step[~at].mean())
    return float(per_step[at].mean()) / inside if inside > 0 else float("nan")


# ---------------------------------------------------------------------------------------------- start and end

def colour_shift(frames: Frames, share: float = 0.15) -> float:
    """CIE76 distance between the mean CIELAB colours of the first and last ``share`` of the video."""
    return shift_of(lab(frames), share)


def shift_of(colours: Array, share: float = 0.15) -> float:
    """:func:`colour_shift` of mean CIELAB colours ``[T, 3]``."""
    size = max(1, round(share * len(colours)))
    return float(np.linalg.norm(colours[-size:].mean(axis=0) - colours[:size].mean(axis=0)))


SERIES = {
    "luma": luma,
    "saturation": saturation,
    "contrast": contrast,
    "clipped": clipped,
    "colourfulness": colourfulness,
    "sharpness": sharpness,
}
"""Per-frame metrics by name."""
