"""How good a generated video is, where the ground truth is known: colour, background, identity, place, motion.

Every measure takes a video ``[B, F, 3, 32, 32]`` with pixels in about [-1, 1] and the scene of the same frames, and
returns ``[B]``. Nothing is clipped unless it says so: colours that burn beyond the range count as burnt. A value is NaN
where there is nothing to measure. What each measure makes of drift that was planted on purpose: docs/measures.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokentrim_hooks.reference.quality_sprites import (
    area_error,
    living,
    place_error,
    shape_error,
    speed_error,
    sprites_alive,
)
from tokentrim_hooks.reference.scenes import Scene

BINS = 6
"""Histogram cells per channel."""
HUES = 180
"""Histogram cells of the circle of hues, two degrees each."""
STILL = 0.02
"""A pixel that changes by no more than this from one frame of the truth to the next stands still (mean of channels)."""
FROZEN = 0.01
"""Smallest ratio that a logarithm is taken of: a hundredth of the motion is as good as none."""


@dataclass(frozen=True)
class Metric:
    """A measure with its name; ``better`` is "lower", "higher", or empty where neither is."""

    name: str
    better: str
    measure: Callable[[Tensor, Scene], Tensor]


def window(scene: Scene, frames: slice) -> Scene:
    """The same scene, only some of its frames."""
    return replace(scene, **{name: getattr(scene, name)[:, frames] for name in ("video", "positions", "masks")})


# ---------------------------------------------------------------------------------------------- colour and contrast

def colour_error(video: Tensor, scene: Scene) -> Tensor:
    """Distance of the colour histograms (clipped to the range): 0 the same, 1 no colour in common."""
    return (_histogram(video) - _histogram(scene.video)).abs().sum(1) / 2


def saturation_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute difference of the background's mean saturation to the truth's; largest minus smallest channel, 0..2.

    Of the background, for a sprite is as saturated as can be: losing it would look like fading.
    """
    return _mean_where(_chroma(video) - _chroma(scene.video), background(video, scene)).abs()


def hue_histogram_error(video: Tensor, scene: Scene) -> Tensor:
    """Distance of the histograms of hue, 0..1: ID-Forcing's Color Drift (2610.03120) as an error, against the truth.

    Theirs is 100 (1 - this) of the first against the last frame. It is nearly at its end after a turn of 12 degrees,
    and the hue of a pixel that is almost grey is noise: see :func:`hue_error`.
    """
    everywhere = torch.ones_like(video[:, :, 0])
    return (_hues(video, everywhere) - _hues(scene.video, everywhere)).abs().sum(1) / 2


def hue_error(video: Tensor, scene: Scene) -> Tensor:
    """By how many degrees the background's colours have to be turned to have the truth's hues: 0..180, 0 is right.

    Earth mover's distance of the histograms on the circle; a pixel weighs as much as it is saturated.
    """
    where = background(video, scene)
    ahead = (_hues(video, _chroma(video) * where) - _hues(scene.video, _chroma(scene.video) * where)).cumsum(1)
    # On a circle the flow through one cell is free; the median makes the whole way shortest.
    return (ahead - ahead.median(1, keepdim=True).values).abs().sum(1) * 360 / HUES


def contrast_ratio(video: Tensor, scene: Scene) -> Tensor:
    """Contrast of the background over the truth's, 1 is right: standard deviation within a frame and channel.

    Of the background, for sprites carry half of the picture's contrast: losing them would look like fading.
    """
    where = background(video, scene)
    return _contrast(video, where) / _contrast(scene.video, where).clamp(min=1e-6)


def contrast_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute binary logarithm of :func:`contrast_ratio`: 0 is right, 1 is half or double."""
    return contrast_ratio(video, scene).clamp(min=FROZEN).log2().abs()


def detail_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute binary logarithm of detail over the truth's: 0 is right, blur and noise are both wrong.

    Detail is the mean absolute Laplacian over the picture's contrast, so that a faded picture is not called blurred.
    """
    return (_detail(video) / _detail(scene.video).clamp(min=1e-6)).clamp(min=FROZEN).log2().abs()


# ---------------------------------------------------------------------------------------------- error to the truth

def truth_error(video: Tensor, scene: Scene) -> Tensor:
    """Mean squared error of pixels to the truth."""
    return (video - scene.video).square().mean((1, 2, 3, 4))


def background_error(video: Tensor, scene: Scene) -> Tensor:
    """Mean squared error where no sprite is: none of the truth, and no living one of the video."""
    return _mean_where((video - scene.video).square().mean(2), background(video, scene))


def still_error(video: Tensor, scene: Scene) -> Tensor:
    """Mean squared error where the truth stands still (the static part, after SNF-Bench 2608.28694)."""
    return _mean_where((video - scene.video).square().mean(2)[:, 1:], ~_moves(scene))


def moving_error(video: Tensor, scene: Scene) -> Tensor:
    """Mean squared error where the truth moves (the moving part, after SNF-Bench 2608.28694)."""
    return _mean_where((video - scene.video).square().mean(2)[:, 1:], _moves(scene))


def background(video: Tensor, scene: Scene) -> Tensor:
    """Pixels that no sprite covers, bool [B, F, H, W]: none of the truth, and no living one of the video.

    Without the latter, a sprite in the wrong place would be an error of the background. One that flooded the frame is
    not alive, so that it cannot hide a background behind it.
    """
    return (scene.masks.sum(2) == 0) & ~living(video, scene)


# ---------------------------------------------------------------------------------------------- motion

def motion_ratio(video: Tensor, scene: Scene) -> Tensor:
    """Mean absolute change between frames over the truth's: 1 is right, less is freezing, more is flicker."""
    return _change(video) / _change(scene.video).clamp(min=1e-6)


def motion_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute logarithm of :func:`motion_ratio`: 0 is right, 0.69 is half or double, 4.6 frozen."""
    return motion_ratio(video, scene).clamp(min=FROZEN).log().abs()


def flicker(video: Tensor, scene: Scene) -> Tensor:
    """Mean absolute change between frames where the truth stands still: 0 is right."""
    return _mean_where(video.diff(dim=1).abs().mean(2), ~_moves(scene))


METRICS = (
    Metric("colour histogram error", "lower", colour_error),
    Metric("saturation error", "lower", saturation_error),
    Metric("sprites alive (identity)", "higher", sprites_alive),
    Metric("error to ground truth", "lower", truth_error),
    Metric("motion error", "lower", motion_error),
    Metric("motion / true motion", "", motion_ratio),
)
"""Stability beside identity and motion, always: a policy that prunes what moves looks stable and loses the scene."""
MORE = (
    Metric("hue error (degrees)", "lower", hue_error),
    Metric("hue histogram error", "lower", hue_histogram_error),
    Metric("contrast error", "lower", contrast_error),
    Metric("contrast / true contrast", "", contrast_ratio),
    Metric("detail error", "lower", detail_error),
    Metric("background error", "lower", background_error),
    Metric("error in the still part", "lower", still_error),
    Metric("flicker in the still part", "lower", flicker),
    Metric("error in the moving part", "lower", moving_error),
    Metric("sprite area error", "lower", area_error),
    Metric("sprite shape error", "lower", shape_error),
    Metric("sprite place error (pixels)", "lower", place_error),
    Metric("sprite speed error", "lower", speed_error),
)
"""What says more exactly which kind of drift it was."""


def _change(video: Tensor) -> Tensor:
    return video.diff(dim=1).abs().mean((1, 2, 3, 4))


def _moves(scene: Scene) -> Tensor:
    """Pixels that change from one frame of the truth to the next, bool [B, F - 1, H, W]."""
    return scene.video.diff(dim=1).abs().mean(2) > STILL


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of ``[B, F, H, W]`` over the pixels of ``where``, [B]; NaN where there is none."""
    return torch.where(where, values, 0.0).sum((1, 2, 3)) / where.sum((1, 2, 3))


def _chroma(video: Tensor) -> Tensor:
    """Largest minus smallest channel of each pixel, [B, F, H, W]."""
    return video.amax(2) - video.amin(2)


def _contrast(video: Tensor, where: Tensor | None = None) -> Tensor:
    """Standard deviation over the pixels (of ``where`` [B, F, H, W]) of each frame and channel, averaged, [B]."""
    weights = torch.ones_like(video[:, :, :1]) if where is None else where[:, :, None].float()
    count = weights.sum((3, 4), keepdim=True).clamp(min=1)
    mean = (video * weights).sum((3, 4), keepdim=True) / count
    variance = ((video - mean).square() * weights).sum((3, 4), keepdim=True) / count
    return variance.sqrt().mean((1, 2, 3, 4))


def _detail(video: Tensor) -> Tensor:
    middle = video[..., 1:-1, 1:-1]
    beside = video[..., 1:-1, 2:] + video[..., 1:-1, :-2] + video[..., 2:, 1:-1] + video[..., :-2, 1:-1]
    return (4 * middle - beside).abs().mean((1, 2, 3, 4)) / _contrast(video).clamp(min=1e-6)


def _hues(video: Tensor, weights: Tensor) -> Tensor:
    """Shares of the hues, [B, HUES], with a weight for each pixel, [B, F, H, W]."""
    red, green, blue = video.unbind(2)
    turn = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) / (2 * torch.pi) % 1
    index = (turn * HUES).long().clamp(max=HUES - 1).flatten(1)
    shares = torch.zeros(len(video), HUES, device=video.device).scatter_add_(1, index, weights.flatten(1))
    return shares / weights.sum((1, 2, 3))[:, None].clamp(min=1e-6)


def _histogram(video: Tensor) -> Tensor:
    """Shares of the BINS^3 cells of the colour cube, [B, BINS^3]."""
    cells = ((video.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(max=BINS - 1)
    index = ((cells[:, :, 0] * BINS + cells[:, :, 1]) * BINS + cells[:, :, 2]).flatten(1)
    counts = torch.zeros(len(video), BINS**3, device=video.device)
    return counts.scatter_add_(1, index, torch.ones_like(index, dtype=counts.dtype)) / index.shape[1]
