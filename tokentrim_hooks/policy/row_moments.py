"""RowMoments: the rows that a commit wrote keep the statistics of the scene's first ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import number, one_of
from tokentrim_hooks.policy.statistics import Moments, pulled
from tokentrim_hooks.policy.views import Place, Rows

OVER_ROWS = (1,)


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
        one_of("reference", self.reference, "first", "anchors")

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
