"""Samplers of the family whose latents are ``[B, C, F, H, W]``: what they give and take, turned to frames first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokentrim_hooks import Call

from .self_forcing import SelfForcing

LATENTS = "noisy_image_or_video"


class ChannelsFirst(SelfForcing):
    """Self-Forcing's rules for such a sampler."""

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """As the family's, frames first."""
        return super().parse({**arguments, LATENTS: arguments[LATENTS].transpose(1, 2)})

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0, frames first."""
        return super().prediction(call, output).transpose(1, 2)

    def with_prediction(self, call: Call, output: Any, x0: Tensor) -> Any:
        """Another x0, channels first."""
        return super().with_prediction(call, output, x0.transpose(1, 2))

    def with_latents(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Other latents, channels first, whether they are given by name or as the first argument."""
        turned = latents.transpose(1, 2)
        return ((turned, *args[1:]), kwargs) if args else (args, {**kwargs, LATENTS: turned})
