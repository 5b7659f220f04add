"""Whether the keys of a call lie where the rows of their cache do, which is told without sorting anything."""

from __future__ import annotations

import torch
from torch import Tensor


class RowsInPlace:
    """A first look for keys: at the place of their row, and as many rows before it as a cache moves that has rolled.

    What it finds is a row, so what is left over is looked for by a sort. Where that was needed once, it is made at
    once from then on, for it costs a second read of the device.

    Attributes:
        holds: whether that was never needed.
    """

    def __init__(self) -> None:
        self.holds = True

    def found(self, keys: Tensor, rows: Tensor, new: int) -> Tensor | None:
        """Which keys are found: BoolTensor ``[B, keys]``; None where they have to be sorted.

        Args:
            keys: their contents, LongTensor ``[B, keys]``.
            rows: of the cache, ``[B, rows]``. new: rows by which it rolls, if it does.
        """
        if not self.holds or keys.ndim != 2 or len(rows) not in (1, len(keys)):
            return None
        found = torch.zeros_like(keys, dtype=torch.bool)
        for moved in (0, new):
            there = rows[:, moved : moved + keys.shape[1]].to(keys.device)
            found[:, : there.shape[1]] |= keys[:, : there.shape[1]] == there
        return found
