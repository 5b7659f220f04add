"""FlowMo: the first chunk's noisy latents are moved until the motion predicted of them varies less between frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedPolicyError
from tokentrim_hooks.policy.base import Policy, number, whole
from tokentrim_hooks.policy.views import Noisy

MOMENTA, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam, as torch has them."""


@dataclass(frozen=True)
class FlowMo(Policy):
    """Guide a video's first chunk towards coherent motion (FlowMo, arXiv 2506.01144; TokenTrim, section 4.1).

    While the noise is high the latents descend the temporal variance of the model's velocity: of the absolute
    differences between neighbouring frames, over these, averaged over channels, at its largest place. The chunk is then
    predicted anew from the moved latents, as in the paper (the released code goes on with the stale velocity).

    Args:
        noise_band: calls at this noise level or above are guided; the paper's first 12 of 50 steps at Wan's shift of 5.
            A few-step sampler has one call there, or two with 0.93.
        step: how far the latents move; the paper's. The released code's default is 0.001.
        iterations: steps per call; the paper's 1. The released class has 3, and its script 1.
        of: what varies, the model's ``"velocity"`` (the paper) or its ``"x0"``.
        optimiser: ``"adam"``, begun anew in each call, so that one iteration moves every element by ``step`` (both), or
            plain ``"descent"`` (Algorithm 1 read to the letter).
        max_regenerations, persist, prune_anchors, coarse: of no effect here.

    Raises:
        UnsupportedPolicyError: while it generates, where a chunk has fewer than three latent frames.
    """

    FEWEST: ClassVar[int] = 3

    noise_band: float = 0.946
    step: float = 0.005
    iterations: int = 1
    of: Literal["velocity", "x0"] = "velocity"
    optimiser: Literal["adam", "descent"] = "adam"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("noise_band", self.noise_band, 0.0, 1.0, "in [0, 1]")
        number("step", self.step, 0.0, math.inf, "a finite number >= 0")
        whole("iterations", self.iterations)
        if self.of not in ("velocity", "x0"):
            raise ValueError(f"of must be 'velocity' or 'x0', got {self.of!r}")
        if self.optimiser not in ("adam", "descent"):
            raise ValueError(f"optimiser must be 'adam' or 'descent', got {self.optimiser!r}")

    def guide(self, chunk: Noisy) -> Tensor | None:
        """The moved latents; None behind the first chunk, and below the band."""
        if chunk.index or not self.step or not self.iterations:
            return None
        if chunk.frames < self.FEWEST:
            raise UnsupportedPolicyError(
                f"FlowMo compares motion, which takes {self.FEWEST} latent frames, and this chunk has {chunk.frames}.\n"
                "Leave FlowMo out for samplers of so short chunks."
            )
        level = chunk.level()
        if level <= 0 or level < self.noise_band:
            return None
        wide = torch.promote_types(chunk.latents.dtype, torch.float32)
        moved, moments = chunk.latents.to(wide), (torch.zeros(()), torch.zeros(()))
        for turn in range(1, self.iterations + 1):
            slope = self._slope(moved.detach(), chunk, level)
            moved, moments = self._descended(moved, slope, moments, turn)
        return moved.to(chunk.latents.dtype)

    def _slope(self, latents: Tensor, chunk: Noisy, level: float) -> Tensor:
        with torch.enable_grad():
            latents.requires_grad_()
            x0 = chunk.predict(latents.to(chunk.latents.dtype)).to(latents.dtype)
            seen = x0 if self.of == "x0" else (latents - x0) / level
            (slope,) = torch.autograd.grad(temporal_variance(seen).sum(), latents)
        return slope

    def _descended(
        self, latents: Tensor, slope: Tensor, moments: tuple[Tensor, Tensor], turn: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.optimiser == "descent":
            return latents.detach() - self.step * slope, moments
        pairs = zip(MOMENTA, moments, (slope, slope * slope), strict=True)
        first, second = (b * old.to(slope.device) + (1 - b) * new for b, old, new in pairs)
        mean, square = (part / (1 - b**turn) for b, part in zip(MOMENTA, (first, second), strict=True))
        return latents.detach() - self.step * mean / (square.sqrt() + EPSILON), (first, second)


def temporal_variance(video: Tensor) -> Tensor:
    """How unevenly a video ``[B, F, C, H, W]`` moves where that is worst: ``[B]``, over the F - 1 differences."""
    motion = (video[:, 1:] - video[:, :-1]).abs()
    return motion.var(dim=1, correction=0).mean(dim=1).amax(dim=(1, 2))
