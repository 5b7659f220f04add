"""The proof that rows of a frame lie in the order of its tokens.

A fork may keep the rows of a frame tile by tile, or frames interleaved; then a prune kills other tokens than those that
drifted, in silence. So a call is made once with other latents at some tokens of each frame. In the first layer V of a
row comes of its token alone: the rows that change are those tokens', and must lie where these are looked for. Frames
themselves may lie in any order for a prune, which kills a token in all of them; a policy that hides frames from a call
needs them in theirs.

Where other rows change as well (latents are mixed before the first layer), or none does (a chunk's own rows are written
by its commit), that shows nothing, and nothing is said.
"""

from __future__ import annotations

import logging
import random

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.policy.drift import grid_of
from tokentrim_hooks.pruning.account import row_contents
from tokentrim_hooks.pruning.context import CacheRows

_logger = logging.getLogger(__name__)

SEED = 101
"""Of the tokens chosen; one under which small grids are told apart, too."""


class RowOrder:
    """Which rows of a cache are written anew where some tokens of a chunk have other latents.

    Args:
        latents: of the chunk, ``[B, F, C, H, W]``. patch_size: of a token.
        frames_too: whether a chunk's frames must lie in their order, oldest first.

    Attributes:
        tokens: of a frame. chosen: BoolTensor ``[F, tokens]``, a set of its own for every frame.
    """

    def __init__(self, latents: Tensor, patch_size: tuple[int, int], frames_too: bool = False) -> None:
        self._frames_too = frames_too
        self._latents, self._patch_size, self._grid = latents, patch_size, grid_of(latents, patch_size)
        self.tokens = self._grid[0] * self._grid[1]
        self.chosen = torch.tensor([_some_of(self.tokens, frame) for frame in range(int(latents.shape[1]))])
        self._before: Tensor | None = None
        self._changed: Tensor | None = None

    @property
    def latents(self) -> Tensor:
        """Latents that are other ones at the tokens chosen, of the same size as they were."""
        some = self.chosen.view(-1, *self._grid)
        for dimension, size in enumerate(self._patch_size, 1):
            some = some.repeat_interleave(size, dimension)
        mask = torch.zeros(some.shape[0], *self._latents.shape[-2:], dtype=torch.bool)
        mask[:, : some.shape[1], : some.shape[2]] = some
        return torch.where(mask[:, None].to(self._latents.device), 1 - self._latents, self._latents)

    def begin(self, rows: CacheRows) -> None:
        """Before the call that is made with :attr:`latents`."""
        self._before = _contents(rows)

    def end(self, rows: CacheRows) -> None:
        """Behind it."""
        before, after = self._before, _contents(rows)
        self._changed = None if before is None or before.shape != after.shape else (after != before).any(0)

    def require(self) -> None:
        """Raise if the rows of some frame are in another order than its tokens. The host is read once.

        Raises:
            UnsupportedContextError: they are.
        """
        if refusal := self.refusal():
            raise UnsupportedContextError(refusal)

    def refusal(self) -> str:
        """What is to be said of rows that are in another order; empty where they are not, or it does not show."""
        changed = [] if self._changed is None else self._changed.nonzero().flatten().tolist()
        frames = [frame.nonzero().flatten().tolist() for frame in self.chosen]
        if len(changed) != sum(map(len, frames)):
            _logger.debug("the order of rows does not show: %d of %d changed", len(changed), sum(map(len, frames)))
            return ""
        if not _are_frames(changed, frames, self.tokens):
            return (
                "rows of a frame lie in the KV cache in another order than its tokens (tiles? interleaved?): others "
                "would be pruned.\nKeep them in the order of tokens, or write an adapter for this fork."
            )
        if self._frames_too and not _are_in_order(changed, frames, self.tokens):
            return (
                "frames of a chunk lie in the KV cache in another order than their time: others would be hidden.\n"
                "Keep them oldest first, or write an adapter that says which is where (CacheRows.frames)."
            )
        return ""


def _contents(rows: CacheRows) -> Tensor:
    """A number for every row of the first layer: LongTensor ``[B, rows]``."""
    values = rows.values[0]
    return row_contents(values, values.dtype, int(values.shape[-2])).flatten(1)


def _some_of(tokens: int, frame: int) -> list[bool]:
    """Tokens of a frame in no order, as many as no frame beside it: what moves rows about moves some to other places.

    Of 15 tokens each of 300 orders at random was told from theirs, of 4 tokens in two frames 96 in 100.
    """
    numbers = list(range(tokens))
    random.Random(SEED + frame).shuffle(numbers)
    some = set(numbers[: max(tokens // (2 + frame % 3), 1)])
    return [number in some for number in range(tokens)]


def _are_frames(changed: list[int], frames: list[list[int]], tokens: int) -> bool:
    """Whether rows are those frames' tokens: whole frames in any order, in places that are a frame's length apart."""
    wanted = sorted(frames)
    for begin in {(changed[0] - frame[0]) % tokens for frame in frames}:
        places: dict[int, list[int]] = {}
        for row in changed:
            places.setdefault((row - begin) // tokens, []).append((row - begin) % tokens)
        if sorted(places.values()) == wanted:
            return True
    return False


def _are_in_order(changed: list[int], frames: list[list[int]], tokens: int) -> bool:
    """Whether rows are those frames' tokens, one frame behind the other."""
    begin = changed[0] - frames[0][0]
    return changed == [begin + number * tokens + token for number, frame in enumerate(frames) for token in frame]
