"""A planted fault: a blotch in known chunks of a rollout, so that detection and recovery can be measured.

The rollout is followed from outside. Up to the last corrupted chunk the finished chunk is overwritten with the true one
just before its clean-context call, so that the context is true and the policy has judged honest predictions: chunks
that are merely given yield no severity, and a policy without severities never prunes. In the corrupted chunks a blotch
is painted over the truth; behind them the model is alone. There are five faults, all made in the same way for the same
seeds; :data:`FAULTS` has their figures.

- ``"context"``: after six true chunks, what is written into the context is corrupted; the accepted chunk stays true (a
  bad write, a lossy offload). What the next chunk is compared with is clean, so whatever the model draws of the blotch
  differs from it, in the right place. This is what comparing neighbours sees best.
- ``"chunk"``: as ``"context"``, but the accepted chunk carries the blotch, too, as if the model had drawn it. Now the
  predecessor is corrupted, and a model that goes on drawing the blotch shows little difference. What shows is where it
  does *not* draw it: then the policy prunes for a repair.
- ``"settled"``: as ``"chunk"``, in three chunks in a row. The model has it from three chunks of its context, and by
  then neighbours do not differ by it: expect nothing, beyond false alarms, from a policy that compares them. The
  columns begin behind the third chunk, which is the first that the policy can do anything about. It judges the second
  and third as well and may prune there, as after ``"chunk"``: what is drawn there is overwritten, but pruned tokens
  stay pruned, and these severities count in its statistics.
- ``"noise"``: as ``"context"``, but the place holds unit Gaussian noise, other in every pixel and frame, instead of one
  colour (a corrupted write). The predecessor is clean. A trained model draws no such noise, so what is compared is what
  the model makes of context that says nothing: a smaller difference than a blotch that is drawn, and a smaller error to
  mend.
- ``"late"``: a glitch, as ``"chunk"`` in every respect but after 14 true chunks. The policy's mean and spread then come
  from more than twice as many severities. Against ``"chunk"`` it says what richer statistics are worth: expect the same
  difference between neighbours, judged by a steadier threshold.

An unpatched model knows no predecessor beside its context: for it ``"context"`` and ``"chunk"`` are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

Where = Literal["context", "chunk", "settled", "noise", "late"]

TOKENS = (2, 3)
"""Height and width of the blotch in tokens."""


@dataclass(frozen=True)
class Fault:
    """When and where the blotch is planted. Chunks are counted from the video's first, the given one, which is 0.

    Attributes:
        healthy: generated chunks made true before the first corrupted one, so that the policy has severities.
        length: corrupted chunks in a row.
        accepted: the accepted chunk carries the blotch, too; otherwise only what is written into the context.
        noise: the place holds Gaussian noise instead of one colour.
    """

    healthy: int = 6
    length: int = 1
    accepted: bool = False
    noise: bool = False

    @property
    def first(self) -> int:
        """The first corrupted chunk."""
        return self.healthy + 1

    @property
    def last(self) -> int:
        """The last corrupted chunk; what follows the fault is counted from here."""
        return self.healthy + self.length

    @property
    def needs(self) -> int:
        """Fewest generated chunks with which there is one behind the fault."""
        return self.last + 1

    def __str__(self) -> str:
        return f"chunk {self.first}" if self.length == 1 else f"chunks {self.first} to {self.last}"


FAULTS: Mapping[Where, Fault] = {
    "context": Fault(),
    "chunk": Fault(accepted=True),
    "settled": Fault(length=3, accepted=True),
    "noise": Fault(noise=True),
    "late": Fault(healthy=14, accepted=True),
}
"""Every fault by its name; the choices of ``tokentrim compare --fault``. What each is: the module's text."""


@dataclass(frozen=True)
class Blotch:
    """One blotch per video: ``corner`` LongTensor ``[B, 2]`` (row, column) in tokens, ``color`` ``[B, 3]`` in [-1, 1].

    ``token`` is the (height, width) of a token in pixels; ``seed`` LongTensor ``[B]`` is that of the noise that can
    stand in the colour's place.
    """

    corner: Tensor
    color: Tensor
    seed: Tensor
    token: tuple[int, int]

    @classmethod
    def draw(cls, count: int, grid: tuple[int, int], token: tuple[int, int], seed: int) -> Blotch:
        """Places, colours, noise for ``count`` videos; colours: corners of their cube, black and white left out."""
        rng = torch.Generator().manual_seed(seed)
        spots = [torch.randint(grid[i] - TOKENS[i] + 1, (count,), generator=rng) for i in range(2)]
        number = torch.randint(1, 7, (count,), generator=rng)
        color = torch.stack([(number >> bit & 1) * 2.0 - 1.0 for bit in range(3)], dim=1)
        noise = torch.randint(2**62, (count,), generator=rng)  # far from the small seeds that draw a video's own noise
        return cls(torch.stack(spots, dim=1), color, noise, token)

    @classmethod
    def joined(cls, parts: Sequence[Blotch]) -> Blotch:
        """Blotches of one video each as one batch, so that a blotch depends on its own seed only."""
        corner, color, seed = (torch.cat([getattr(b, name) for b in parts]) for name in ("corner", "color", "seed"))
        return cls(corner, color, seed, parts[0].token)

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
        return self._put(self.color[:, None, :, None, None], chunk)

    def scramble(self, chunk: Tensor) -> Tensor:
        """A copy of ``chunk`` ``[B, F, 3, H, W]`` with unit Gaussian noise in the place; the same at every call."""
        streams = [torch.Generator().manual_seed(int(seed)) for seed in self.seed]
        return self._put(torch.stack([torch.randn(chunk.shape[1:], generator=rng) for rng in streams]), chunk)

    def _put(self, what: Tensor, chunk: Tensor) -> Tensor:
        height, width = chunk.shape[-2:]
        area = self.area(height, width)[:, None, None].to(chunk.device)
        return torch.where(area, what.to(chunk), chunk)

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
        fault: which chunks are corrupted, and how; earlier ones are made true.
        tokens: tokens of a frame, in which ``current_start`` counts.

    After the run ``planted`` holds what was written into the context ``[B, F, 3, H, W]`` for each corrupted chunk that
    was committed, by its number.
    """

    def __init__(self, generator: nn.Module, truth: Tensor, blotch: Blotch, fault: Fault, tokens: int) -> None:
        self.generator, self.truth, self.blotch, self.fault, self.tokens = generator, truth, blotch, fault, tokens
        self.planted: dict[int, Tensor] = {}

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
        start = int(kwargs["current_start"]) // self.tokens
        index = start // latents.shape[1]
        if index > self.fault.last or bool((kwargs["timestep"] != 0).any()):
            return None
        # In place, so that the sampler's own tensor, which is what a patch takes for accepted, is the true chunk.
        latents.copy_(self.truth[:, start : start + latents.shape[1]])
        if index < self.fault.first:
            return None
        corrupt = self.blotch.scramble if self.fault.noise else self.blotch.paint
        self.planted[index] = corrupt(latents)
        if self.fault.accepted:
            latents.copy_(self.planted[index])
            return None
        return args, {**kwargs, "noisy_image_or_video": self.planted[index]}
