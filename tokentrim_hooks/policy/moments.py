"""Statistics that are fed back: of the rows that a commit wrote, and of the latents that the sampler goes on with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedPolicyError
from tokentrim_hooks.policy.base import Policy, number, whole
from tokentrim_hooks.policy.statistics import Moments, pulled
from tokentrim_hooks.policy.views import Denoised, Place, Rows

OVER_ROWS = (1,)
OVER_FRAMES_AND_PIXELS = (1, 3, 4)


@dataclass(frozen=True)
class RowMoments(Policy):
    """Pull the rows just committed towards the moments of earlier ones, per head and channel.

    The statistics half of TetherCache (TAME, arXiv 2606.13035).

    Args:
        strength: how far, from 0 (not at all) to 1 (their moments are those of the reference).
        of: which rows, ``("v",)`` or ``("k", "v")``.
        reference: ``"first"``, the scene's first chunk as it was committed, or ``"anchors"``, the sinks.
        max_regenerations, persist, prune_anchors, coarse: of no effect here.
    """

    strength: float = 0.35
    of: tuple[str, ...] = ("v",)
    reference: Literal["first", "anchors"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("strength", self.strength, 0.0, 1.0, "in [0, 1]")
        object.__setattr__(self, "of", tuple(self.of))
        if not self.of or not set(self.of) <= {"k", "v"}:
            raise ValueError(f"of must name 'k', 'v' or both, got {self.of!r}")
        if self.reference not in ("first", "anchors"):
            raise ValueError(f"reference must be 'first' or 'anchors', got {self.reference!r}")

    def settle(self, chunk: Place, rows: Rows) -> Rows | None:
        """The rows with their moments moved; None where there is nothing to compare with."""
        if not self.strength:
            return None
        values = self._moved(rows.values, rows.first_values, rows.anchor_values) if "v" in self.of else None
        keys = None
        if "k" in self.of and rows.keys is not None:
            keys = self._moved(rows.keys, rows.first_keys, rows.anchor_keys)
        if values is None and keys is None:
            return None
        return replace(rows, values=rows.values if values is None else values, keys=rows.keys if keys is None else keys)

    def _moved(self, rows: Tensor, first: Moments | None, anchors: Tensor | None) -> Tensor | None:
        if self.reference == "anchors":
            first = None if anchors is None or not anchors.shape[1] else Moments.of(anchors, OVER_ROWS)
        return None if first is None else pulled(rows, OVER_ROWS, first, self.strength)


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


@dataclass(frozen=True)
class LateMean(Policy):
    """The answer is the mean of the last few x0 predictions, for late steps over-sharpen (T-RFlow, arXiv 2606.22370).

    Args:
        last: how many predictions, the last one among them; a chunk of fewer steps uses those it has.
        max_regenerations, persist, prune_anchors, coarse: of no effect here.
    """

    last: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.last, int) or isinstance(self.last, bool) or self.last < 1:
            raise ValueError(f"last must be a whole number >= 1, got {self.last!r}")

    @property
    def remembers(self) -> int:
        """Earlier predictions of a chunk that :meth:`correct` is shown."""
        return self.last - 1

    def correct(self, chunk: Denoised) -> Tensor | None:
        """The mean of the last predictions."""
        late = [*chunk.earlier, chunk.prediction][-self.last :]
        mean = torch.stack([x0.to(torch.promote_types(x0.dtype, torch.float32)) for x0 in late]).mean(0)
        return mean.to(chunk.prediction.dtype) if len(late) > 1 else None
