"""Statistics of latents, of cache rows and of motion, and one step down a slope: pure tensor functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6
"""Below this a deviation is no scale to divide by."""
OVER_FRAMES_AND_PIXELS = (1, 3, 4)
"""Dimensions of latents ``[B, F, C, H, W]`` over which a channel has its moments."""
SPREAD = 1.4826
"""Standard deviations in a median absolute deviation, for a normal distribution."""
MOMENTA, SMALLEST = (0.9, 0.999), 1e-8
"""Of Adam, as torch has them."""


@dataclass(frozen=True)
class Moments:
    """Mean and population standard deviation over some dimensions, which are kept with length 1; float32 or wider."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor, dims: Sequence[int]) -> Moments:
        """Moments of ``values`` over ``dims``."""
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        std, mean = torch.std_mean(wide, dim=tuple(dims), correction=0, keepdim=True)
        return cls(mean, std)


def pulled(values: Tensor, dims: Sequence[int], target: Moments, strength: float) -> Tensor:
    """Values whose moments over ``dims`` have gone ``strength`` of the way to ``target``, in the type of ``values``.

    Standardised, then given the mean and the deviation in between: ``(x - m) / s * s' + m'`` with
    ``s' = (1 - strength) s + strength s_target`` and ``m'`` likewise. Where ``s`` vanishes only the mean moves.
    """
    own = Moments.of(values, dims)
    mean = torch.lerp(own.mean, target.mean.to(own.mean.dtype), strength)
    std = torch.lerp(own.std, target.std.to(own.std.dtype), strength)
    scale = torch.where(own.std > EPSILON, std / own.std.clamp(min=EPSILON), torch.ones_like(std))
    moved: Tensor = (values.to(mean.dtype) - own.mean) * scale + mean
    return moved.to(values.dtype)


def robust(values: Tensor) -> tuple[Tensor, Tensor]:
    """Median of ``[B, n]``, and the median distance from it as that of a standard deviation: ``[B]`` each."""
    median = values.median(dim=1, keepdim=True).values
    distance = (values - median).abs().median(dim=1).values
    return median.squeeze(1), SPREAD * distance


def temporal_variance(video: Tensor) -> Tensor:
    """How unevenly a video ``[B, F, C, H, W]`` moves where that is worst: ``[B]``, over the F - 1 differences."""
    motion = (video[:, 1:] - video[:, :-1]).abs()
    return motion.var(dim=1, correction=0).mean(dim=1).amax(dim=(1, 2))


def adam(slope: Tensor, before: tuple[Tensor, Tensor], turn: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Adam's direction down ``slope`` at its step ``turn``, from 1, and the two moments that the next step takes."""
    pairs = zip(MOMENTA, before, (slope, slope * slope), strict=True)
    first, second = (b * old.to(slope.device) + (1 - b) * new for b, old, new in pairs)
    mean, square = (part / (1 - b**turn) for b, part in zip(MOMENTA, (first, second), strict=True))
    return mean / (square.sqrt() + SMALLEST), (first, second)
