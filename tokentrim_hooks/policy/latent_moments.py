"""LatentMoments: the latents that the sampler goes on with keep the statistics of the scene's first chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedPolicyError
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import number, whole
from tokentrim_hooks.policy.statistics import OVER_FRAMES_AND_PIXELS, Moments, pulled
from tokentrim_hooks.policy.views import Denoised


@dataclass(frozen=True)
class LatentMoments(Policy):
    """Pull a finished chunk's mean and deviation per channel towards those of the scene's first chunk.

    The moment pin of chained clips (colour matching, fed back instead of graded afterwards).

    Args:
        strength: how far, from 0 to 1.
        channels: the channels that are moved; None for all.
        max_regenerations, persist, prune_anchors, coarse: of no effect here.
    """

    strength: float = 0.35
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("strength", self.strength, 0.0, 1.0, "in [0, 1]")
        for channel in self.channels or ():
            whole("channels", channel)

    def correct(self, chunk: Denoised) -> Tensor | None:
        """x0 with its moments moved; None for the scene's first chunk."""
        if chunk.opening is None or not self.strength:
            return None
        target = Moments.of(chunk.opening, OVER_FRAMES_AND_PIXELS)
        moved = pulled(chunk.prediction, OVER_FRAMES_AND_PIXELS, target, self.strength)
        if self.channels is None:
            return moved
        if max(self.channels, default=0) >= moved.shape[2]:
            raise UnsupportedPolicyError(
                f"LatentMoments.channels {self.channels} of latents with {moved.shape[2]}; count from 0"
            )
        chosen = torch.zeros(moved.shape[2], dtype=torch.bool)
        chosen[list(self.channels)] = True
        return torch.where(chosen.to(moved.device).view(1, 1, -1, 1, 1), moved, chunk.prediction)
