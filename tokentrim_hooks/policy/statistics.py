"""Moments of latents and of cache rows, for policies that feed statistics back: pure tensor functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6
"""Below this a deviation is no scale to divide by."""


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
