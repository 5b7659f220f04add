"""A planted fault: a coloured blotch in one known chunk of a rollout, so that detection and recovery can be measured.

The rollout is followed from outside. Up to and including chunk ``at`` the finished chunk is overwritten with the true
one just before its clean-context call, so that the context is true and the policy has judged honest predictions:
chunks that are merely given yield no severity, and a policy without severities never prunes. At chunk ``at`` a blotch
is painted, in one of two ways:

- ``"context"``: only what is written into the context is corrupted; the accepted chunk stays true (a bad write, a
  lossy offload). What TokenTrim compares the next chunk with is clean.
- ``"chunk"``: the accepted chunk itself carries the blotch, as if the model had drawn it. Then the predecessor is
  corrupted too, and a model that goes on drawing the blotch shows little difference between neighbours.

For an unpatched model the two are the same: it knows no predecessor beside its context.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

Where = Literal["context", "chunk"]

TOKENS = (2, 3)
"""Height and width of the blotch in tokens."""


@dataclass(frozen=True)
class Blotch:
    """One blotch per video: ``corner`` LongTensor ``[B, 2]`` (row, column) in tokens, ``color`` ``[B, 3]`` in [-1, 1].

    ``token`` is the (height, width) of a token in pixels.
    """

    corner: Tensor
    color: Tensor
    token: tuple[int, int]

    @classmethod
    def draw(cls, count: int, grid: tuple[int, int], token: tuple[int, int], seed: int) -> Blotch:
        """Places and colours for ``count`` videos; colours are corners of the colour cube, black and white left out."""
        rng = torch.Generator().manual_seed(seed)
        spots = [torch.randint(grid[i] - TOKENS[i] + 1, (count,), generator=rng) for i in range(2)]
        number = torch.randint(1, 7, (count,), generator=rng)
        color = torch.stack([(number >> bit & 1) * 2.0 - 1.0 for bit in range(3)], dim=1)
        return cls(torch.stack(spots, dim=1), color, token)

    def area(self, height: int, width: int, margin: int = 0) -> Tensor:
        """BoolTensor ``[B, H, W]``: pixels of the blotch, with ``margin`` tokens around it."""
        sides = []
        for i, (length, size) in enumerate(zip((height, width), self.token, strict=True)):
            low = (self.corner[:, i, None] - margin) * size
            high = (self.corner[:, i, None] + TOKENS[i] + margin) * size
            pixel = torch.arange(length)
            sides.append((pixel >= low) & (pixel < high))
        return sides[0][:, :, None] & sides[1][:, None, :]

    def paint(self, chunk: Tensor) -> Tensor:
        """A copy of ``chunk`` ``[B, F, 3, H, W]`` with the blotch in every frame."""
        height, width = chunk.shape[-2:]
        area = self.area(height, width)[:, None, None].to(chunk.device)
        return torch.where(area, self.color.to(chunk)[:, None, :, None, None], chunk)

    def error(self, chunk: Tensor, truth: Tensor, margin: int = 1) -> Tensor:
        """Mean squared error ``[B]`` around the place; both ``[B, F, 3, H, W]`` with pixels in [-1, 1]."""
        height, width = chunk.shape[-2:]
        area = self.area(height, width, margin)[:, None, None].to(chunk.device)
        squared = ((chunk - truth) ** 2 * area).sum(dim=(1, 2, 3, 4))
        return squared / (area.sum(dim=(1, 2, 3, 4)) * chunk.shape[1] * chunk.shape[2])


class Planter:
    """Overwrites finished chunks through a forward pre-hook on a generator; a context manager.

    The generator is called as Self-Forcing's: ``noisy_image_or_video`` at ``timestep`` 0 writes clean context.

    Args:
        generator: the denoiser that the sampler calls.
        truth: true video ``[B, F, 3, H, W]`` from its first frame on.
        blotch: what to paint.
        at: index of the chunk that is corrupted; earlier ones are made true.
        tokens: tokens of a frame, in which ``current_start`` counts.
        where: see the module's text.

    After the run ``planted`` is the corrupted chunk, or None if chunk ``at`` was never committed.
    """

    def __init__(
        self, generator: nn.Module, truth: Tensor, blotch: Blotch, at: int, tokens: int, where: Where = "context"
    ) -> None:
        self.generator, self.truth, self.blotch, self.at, self.where = generator, truth, blotch, at, where
        self.tokens = tokens
        self.planted: Tensor | None = None

    def __enter__(self) -> Planter:
        # Appended, never prepended: hooks of a patch come first and see the chunk as the sampler hands it over.
        self._hook = self.generator.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        latents: Tensor = kwargs["noisy_image_or_video"]
        first = int(kwargs["current_start"]) // self.tokens
        index = first // latents.shape[1]
        if index > self.at or bool((kwargs["timestep"] != 0).any()):
            return None
        # In place, so that the sampler's own tensor, which is what a patch takes for accepted, is the true chunk.
        latents.copy_(self.truth[:, first : first + latents.shape[1]])
        if index < self.at:
            return None
        self.planted = self.blotch.paint(latents)
        if self.where == "chunk":
            latents.copy_(self.planted)
            return None
        return args, {**kwargs, "noisy_image_or_video": self.planted}
