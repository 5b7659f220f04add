"""What policies compare with and what they have done: the scene's first chunk, and acts beside judging."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokentrim_hooks.policy.drift import frame_summaries
from tokentrim_hooks.policy.statistics import Moments


@dataclass(frozen=True)
class Act:
    """What a policy did beside judging, at one call of a chunk.

    Attributes:
        policy, hook: names.
        rows: of the context, hidden or rewritten, of all samples.
        norm: Euclidean norm of what was added to x0, on the device until it is read.
        told: of rows that were rewritten, on the device: :data:`TOLD`, the mean over layers, and a number that is
            finite where their keys are. moments: the first of these by name, once they were read.
    """

    TOLD: ClassVar[tuple[str, ...]] = ("mean_before", "std_before", "mean_after", "std_after")
    """Mean and standard deviation of a layer's rows of V, over samples, tokens, heads and channels."""

    policy: str
    hook: str
    rows: int = 0
    norm: Tensor | float | None = None
    told: Tensor | None = None
    moments: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Frames:
    """Summaries of a scene's finished frames, by latent frame: made on the device, brought to the host when asked for.

    Attributes:
        known: on the host, ``[B, D]`` each. waiting: (first frame, ``[B, F, D]``) of chunks still on the device.
    """

    known: dict[int, Tensor] = field(default_factory=dict)
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, start: int, latents: Tensor) -> None:
        """Keep the frames of a finished chunk, ``[B, F, C, H, W]``; waits for nothing."""
        self.waiting.append((start, frame_summaries(latents)))

    def of(self, numbers: Sequence[int | None]) -> Tensor | None:
        """Summaries of these frames, ``[B, frames, D]`` on the CPU, NaN for unknown ones; None while all are.

        One synchronisation for a chunk that has finished since. Frames older than the oldest named are forgotten.
        """
        for start, summaries in self.waiting:
            self.known |= {start + i: one for i, one in enumerate(summaries.cpu().unbind(1))}
        self.waiting = []
        oldest = min((number for number in numbers if number is not None), default=0)
        self.known = {number: one for number, one in self.known.items() if number >= oldest}
        if not self.known:
            return None
        unknown = torch.full_like(next(iter(self.known.values())), math.nan)
        return torch.stack([unknown if n is None else self.known.get(n, unknown) for n in numbers], dim=1)


@dataclass
class Scene:
    """What policies compare with: the scene's first chunk.

    Attributes:
        opening: it, as it was accepted, ``[B, F, C, H, W]``; None while it is in progress, or if nobody asks.
        moments: of the rows that its commit wrote: (stream, layer) -> (of V, of K).
        frames: its finished frames, if a policy compares them.
    """

    opening: Tensor | None = None
    moments: dict[tuple[Hashable, int], tuple[Moments, Moments | None]] = field(default_factory=dict)
    frames: Frames = field(default_factory=Frames)
