"""How good a generated video is, where the ground truth is known: colour, identity, place, motion.

Every measure takes a video ``[B, F, 3, 32, 32]`` with pixels in about [-1, 1] and the scene of the same frames, and
returns ``[B]``. Nothing is clipped unless it says so: colours that burn beyond the range count as burnt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.reference.scenes import Scene

BINS = 6
"""Histogram cells a channel."""
NEAR = 0.5
"""A pixel has a sprite's colour if it is at most this far from it (root mean square over the channels)."""
VISIBLE = 12.0
"""A sprite counts in the frames in which at least so many pixels of it can be seen (a whole one has 50 or more)."""
SMALLEST, LARGEST = 0.5, 2.0
"""A sprite is alive while so much of its true area has its colour; more than twice means that it flooded the frame."""


@dataclass(frozen=True)
class Metric:
    """A measure with its name; ``better`` is "lower", "higher", or empty where neither is."""

    name: str
    better: str
    measure: Callable[[Tensor, Scene], Tensor]


def window(scene: Scene, frames: slice) -> Scene:
    """The same scene, only some of its frames."""
    return Scene(
        video=scene.video[:, frames],
        positions=scene.positions[:, frames],
        colors=scene.colors,
        masks=scene.masks[:, frames],
        palette=scene.palette,
        shapes=scene.shapes,
    )


def colour_error(video: Tensor, scene: Scene) -> Tensor:
    """Distance of the colour histograms (clipped to the range): 0 the same, 1 no colour in common."""
    return (_histogram(video) - _histogram(scene.video)).abs().sum(1) / 2


def saturation_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute difference of mean saturation to the truth's; largest minus smallest channel, 2 is a pure colour."""
    return (_saturation(video) - _saturation(scene.video)).abs()


def sprites_alive(video: Tensor, scene: Scene) -> Tensor:
    """Share of visible sprites that are alive: anywhere in the frame, about their area has about their colour."""
    distance = (video[:, :, None] - scene.colors[:, None, :, :, None, None]).square().mean(3).sqrt()
    area, seen = (distance <= NEAR).float().sum((3, 4)), scene.masks.sum((3, 4))
    alive = (area >= SMALLEST * seen) & (area <= LARGEST * seen)
    counts = seen >= VISIBLE
    return (alive & counts).float().sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)


def truth_error(video: Tensor, scene: Scene) -> Tensor:
    """Mean squared error of pixels to the truth."""
    return (video - scene.video).square().mean((1, 2, 3, 4))


def motion_ratio(video: Tensor, scene: Scene) -> Tensor:
    """Mean absolute change between frames over the truth's: 1 is right, less is freezing, more is flicker."""
    return _change(video) / _change(scene.video).clamp(min=1e-6)


def motion_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute logarithm of :func:`motion_ratio`: 0 is right, 0.69 is half or double."""
    return motion_ratio(video, scene).clamp(min=1e-6).log().abs()


METRICS = (
    Metric("colour histogram error", "lower", colour_error),
    Metric("saturation error", "lower", saturation_error),
    Metric("sprites alive (identity)", "higher", sprites_alive),
    Metric("error to ground truth", "lower", truth_error),
    Metric("motion error", "lower", motion_error),
    Metric("motion / true motion", "", motion_ratio),
)
"""Stability beside identity and motion, always: a policy that prunes what moves looks stable and loses the scene."""


def _change(video: Tensor) -> Tensor:
    return video.diff(dim=1).abs().mean((1, 2, 3, 4))


def _saturation(video: Tensor) -> Tensor:
    return (video.amax(2) - video.amin(2)).mean((1, 2, 3))


def _histogram(video: Tensor) -> Tensor:
    """Shares of the BINS^3 cells of the colour cube, [B, BINS^3]."""
    cells = ((video.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(max=BINS - 1)
    index = ((cells[:, :, 0] * BINS + cells[:, :, 1]) * BINS + cells[:, :, 2]).flatten(1)
    counts = torch.zeros(len(video), BINS**3, device=video.device)
    return counts.scatter_add_(1, index, torch.ones_like(index, dtype=counts.dtype)) / index.shape[1]
