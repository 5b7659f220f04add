"""What policies compare with and what they have done: the scene's first chunk, and acts beside judging."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from tokentrim_hooks.policy.statistics import Moments


@dataclass(frozen=True)
class Act:
    """What a policy did beside judging, at one call of a chunk.

    Attributes:
        policy, hook: names.
        rows: of the context, hidden or rewritten, of all samples.
        norm: Euclidean norm of what was added to x0, on the device.
    """

    policy: str
    hook: str
    rows: int = 0
    norm: Tensor | None = None


@dataclass
class Scene:
    """What policies compare with: the scene's first chunk.

    Attributes:
        opening: it, as it was accepted, ``[B, F, C, H, W]``; None while it is in progress, or if nobody asks.
        moments: of the rows that its commit wrote: (stream, layer) -> (of V, of K).
    """

    opening: Tensor | None = None
    moments: dict[tuple[Hashable, int], tuple[Moments, Moments | None]] = field(default_factory=dict)
