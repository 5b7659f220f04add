"""FlowMo: the first chunk's noisy latents are moved until the motion predicted of them varies less between frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedPolicyError
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import number, one_of, whole
from tokentrim_hooks.policy.statistics import adam, temporal_variance
from tokentrim_hooks.policy.views import Noisy


@dataclass(frozen=True)
class FlowMo(Policy):
    """Guide a video's first chunk towards coherent motion (FlowMo, arXiv 2506.01144; TokenTrim, section 4.1).

    While the noise is high the latents descend the temporal variance of the model's velocity. The chunk is then
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
        one_of("of", self.of, "velocity", "x0")
        one_of("optimiser", self.optimiser, "adam", "descent")

    def guide(self, chunk: Noisy) -> Tensor | None:
        """The moved latents; None behind the first chunk, and below the band."""
        if chunk.index or not self.step or not self.iterations:
            return None
        if chunk.frames < 3:
            words = f"FlowMo compares differences between frames, and this chunk has {chunk.frames}; it takes three"
            raise UnsupportedPolicyError(f"{words}.\nLeave FlowMo out for samplers of so short chunks.")
        if (level := chunk.level()) <= 0 or level < self.noise_band:
            return None
        wide = torch.promote_types(chunk.latents.dtype, torch.float32)
        moved, moments = chunk.latents.to(wide), (torch.zeros(()), torch.zeros(()))
        for turn in range(1, self.iterations + 1):
            slope = self._slope(moved.detach(), chunk, level)
            if self.optimiser == "adam":
                slope, moments = adam(slope, moments, turn)
            moved = moved.detach() - self.step * slope
        return moved.to(chunk.latents.dtype)

    def _slope(self, latents: Tensor, chunk: Noisy, level: float) -> Tensor:
        with torch.enable_grad():
            latents.requires_grad_()
            x0 = chunk.predict(latents.to(chunk.latents.dtype)).to(latents.dtype)
            seen = x0 if self.of == "x0" else (latents - x0) / level
            (slope,) = torch.autograd.grad(temporal_variance(seen).sum(), latents)
        return slope
