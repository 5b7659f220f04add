"""Whether frames leave a KV cache as a whole, and stay in their order: else places say nothing of tokens and frames."""

from __future__ import annotations

import torch
from torch import Tensor


class WholeFrames:
    """The finished frames of a cache by the contents of their rows; see account.py.

    Args:
        contents: a number for every row, LongTensor ``[B, frames * per_frame]``.
        per_frame: rows of a frame.
    """

    def __init__(self, contents: Tensor, per_frame: int) -> None:
        self._samples = len(contents)
        self._known, index = contents.flatten().sort()
        self._frame = index // per_frame
        # Rows that are alike, as those of black bars are, tell nothing of the frame that they belong to.
        differs = torch.ones(len(index) + 1, dtype=torch.bool, device=contents.device)
        differs[1:-1] = self._known[1:] != self._known[:-1]
        self._unique = (differs[1:] & differs[:-1]).int()
        self._empty = self._unique.new_zeros(contents.numel() // per_frame)
        self._size = self._empty.index_add(0, self._frame, self._unique)

    def torn(self, contents: Tensor) -> Tensor:
        """Whether keys have some rows of several frames only: BoolTensor ``[]`` on the device.

        One frame per sample may be cut, by the edge of a window.

        Args:
            contents: of the keys, LongTensor of any shape.
        """
        keys = contents.flatten().contiguous()
        place = torch.searchsorted(self._known, keys).clamp(max=len(self._known) - 1)
        seen = torch.zeros_like(self._unique).index_add(0, place, (self._known[place] == keys).int()) > 0
        present = self._empty.index_add(0, self._frame, self._unique * seen)
        cut = (present > 0) & (present < self._size)
        return cut.sum() > self._samples


def out_of_order(before: Tensor, now: Tensor) -> Tensor:
    """Whether rows that were there lie in another order, or behind newer ones: BoolTensor ``[]`` on the device.

    Rows that are alike are not told apart: then nothing is found.

    Args:
        before, now: contents of a cache's history at two chunks, oldest first, LongTensor ``[B, rows]``.
    """
    known, origin = before.sort(dim=-1)
    place = torch.searchsorted(known, now.contiguous()).clamp(max=known.shape[-1] - 1)
    stays = known.gather(-1, place) == now
    origin = torch.where(stays, origin.gather(-1, place), before.shape[-1])
    alike = (known[:, 1:] == known[:, :-1]).any()
    return (origin[:, 1:] < origin[:, :-1]).any() & ~alike
