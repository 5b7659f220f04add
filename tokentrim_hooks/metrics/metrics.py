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
OPPONENT = 255.0 * np.array([[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]], dtype=np.float32)
"""Red-green and yellow-blue, on the 0..255 scale."""
FLOW_SIDE = 240
"""Pixels that the short side of a frame keeps at least when it is reduced for optical flow."""
BINS = 8
"""Histogram bins per colour channel."""
LAGS = (1, 2, 5, 10, 20, 50)
"""Distances of frames that are compared, in frames."""


# ---------------------------------------------------------------------------------------------- colour and sharpness

def luma(frames: Frames) -> Array:
    """Mean luma per frame, ``[T]`` in [0, 1]."""
    return luma_of(luma_planes(frames))


def luma_of(planes: Array) -> Array:
    """:func:`luma` of :func:`luma_planes`."""
    return np.asarray(planes.mean(axis=(1, 2)))


def contrast(frames: Frames) -> Array:
    """RMS contrast per frame: standard deviation of luma, ``[T]``."""
    return contrast_of(luma_planes(frames))


def contrast_of(planes: Array) -> Array:
    """:func:`contrast` of :func:`luma_planes`."""
    return np.asarray(planes.std(axis=(1, 2)))


def clipped(frames: Frames) -> Array:
    """Share of a frame's pixels whose luma is below DARK or above BRIGHT, ``[T]``."""
    return clipped_of(luma_planes(frames))


def clipped_of(planes: Array) -> Array:
    """:func:`clipped` of :func:`luma_planes`."""
    return np.asarray(((planes < DARK) | (planes > BRIGHT)).mean(axis=(1, 2)))


def saturation(frames: Frames) -> Array:
    """Mean HSV saturation per frame, ``[T]`` in [0, 1]: (max - min) / max of R, G, B, 0 for black."""
    red, green, blue = np.ascontiguousarray(np.moveaxis(frames, -1, 0))  # numpy is slow on every third number
    high, low = (take(take(red, green), blue) for take in (np.maximum, np.minimum))
    share = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    return np.asarray(share.mean(axis=(1, 2), dtype=np.float64))


def colourfulness(frames: Frames) -> Array:
    """Hasler and Suesstrunk's colourfulness (2003) per frame, on the 0..255 scale, ``[T]``."""
    cv2 = require("cv2", "metrics")
    found = [cv2.meanStdDev(cv2.transform(frame, OPPONENT)) for frame in frames]
    return np.array([np.hypot(*spread.ravel()) + 0.3 * np.hypot(*mean.ravel()) for mean, spread in found])


def lab(frames: Frames) -> Array:
    """Mean CIELAB colour per frame (D65), ``[T, 3]``: L* in 0..100, a*, b*."""
    cv2 = require("cv2", "metrics")
    return np.array([cv2.mean(cv2.cvtColor(frame, cv2.COLOR_RGB2LAB))[:3] for frame in frames])


def sharpness(frames: Frames) -> Array:
    """Variance of the Laplacian of luma (0..255 scale) per frame, ``[T]``."""
    return sharpness_of(luma_planes(frames))


def sharpness_of(planes: Array) -> Array:
    """:func:`sharpness` of :func:`luma_planes`."""
    cv2 = require("cv2", "metrics")
    return np.array([cv2.Laplacian(plane, cv2.CV_64F).var() for plane in 255.0 * planes])


def luma_planes(frames: Frames) -> Array:
    """Luma of every pixel, ``[T, H, W]`` in [0, 1]: what four metrics and motion begin with."""
    return np.asarray(frames.astype(np.float64) @ LUMA)


# ---------------------------------------------------------------------------------------------- time

def flicker(frames: Frames) -> float:
    """VBench's temporal flickering: (255 - mean |f_t - f_t+1|) / 255; 1 = no change. 1 for a single frame."""
    return 1.0 - float(np.mean([change_between(a, b) for a, b in pairwise(frames)])) if len(frames) > 1 else 1.0


def change_between(one: Frames, other: Frames) -> float:
    """Mean absolute difference of two frames ``[H, W, 3]``, in 0..1."""
    cv2 = require("cv2", "metrics")
    return float(cv2.norm(one, other, cv2.NORM_L1)) / one.size


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
    index = np.minimum((frame * BINS).astype(np.uint8), BINS - 1)
    flat = (index[..., 0].astype(np.intp) * BINS + index[..., 1]) * BINS + index[..., 2]
    return np.asarray(np.bincount(flat.ravel(), minlength=BINS**3) / flat.size)


def motion(frames: Frames) -> Array:
    """Mean magnitude of Farneback's optical flow between neighbouring frames, pixels per frame, ``[T-1]``.

    Frames whose short side is 480 or longer are reduced to 240 or more (:func:`grey`), where flow costs a quarter or
    less; pixels are the frame's own all the same.
    """
    scale = reduction(frames.shape[1:3])
    return scale * np.array([motion_between(a, b) for a, b in pairwise(grey(frames))])


def reduction(size: tuple[int, ...]) -> int:
    """By which whole number height and width are divided before optical flow: the short side keeps FLOW_SIDE pixels."""
    return max(1, min(size) // FLOW_SIDE)


def grey(frames: Frames) -> npt.NDArray[np.uint8]:
    """Luma planes as optical flow takes them, ``[T, h, w]`` in 0..255; means of squares of :func:`reduction` pixels."""
    return grey_of(luma_planes(frames))


def grey_of(planes: Array) -> npt.NDArray[np.uint8]:
    """:func:`grey` of :func:`luma_planes`."""
    cv2 = require("cv2", "metrics")
    scale = reduction(planes.shape[1:])
    size = planes.shape[2] // scale, planes.shape[1] // scale
    planes = 255.0 * planes
    if scale > 1:
        planes = np.stack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])
    return planes.astype(np.uint8)


def motion_between(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Mean magnitude of Farneback's optical flow between two planes of :func:`grey`, in pixels of these planes."""
    cv2 = require("cv2", "metrics")
    flow = cv2.calcOpticalFlowFarneback(one, other, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    return float(cv2.magnitude(flow[..., 0], flow[..., 1]).mean(dtype=np.float64))


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
OF_LUMA = {"luma": luma_of, "contrast": contrast_of, "clipped": clipped_of, "sharpness": sharpness_of}
"""Those of them that need no more than :func:`luma_planes`, so that a frame's are made once."""
