"""Accounts for the keys of calls from which rows of a KV cache are hidden, as account.py does where rows are dead.

What is hidden comes back when the call has ended, so nothing of it lives on in rows, and an account is of one call
alone: its keys are rows that the cache holds as it begins, or the chunk's own. That is looked at once per chunk and
kind of call; calls between them are taken to read as it did.

Which rows are a frame's is said by their order, oldest first, unless the adapter says it (:attr:`CacheRows.frames`). So
rows that lay there as an earlier call ended must lie as they lay, and newer ones behind them.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from tokentrim_hooks.pruning.account import KeyAccount, row_contents
from tokentrim_hooks.pruning.context import CacheRows, Context
from tokentrim_hooks.pruning.frames import out_of_order
from tokentrim_hooks.pruning.in_place import RowsInPlace
from tokentrim_hooks.pruning.layers import LayersAlike
from tokentrim_hooks.pruning.sparing import account_of


class AccountsOfHidden:
    """Which calls are looked at, and what they left for the next: layers with marks in other rows, where keys lie.

    Args:
        keeps_memory: whether keys may be memory beside the rows, which the adapter keeps right.
    """

    def __init__(self, keeps_memory: bool) -> None:
        self._keeps_memory = keeps_memory
        self._looked: dict[tuple[Hashable, str], int] = {}
        self._layers: dict[Hashable, LayersAlike] = {}
        self._in_place: dict[Hashable, RowsInPlace] = {}
        self._history: dict[Hashable, Tensor] = {}
        self._looks = False

    def account(self, context: CacheRows, stream: Hashable, phase: str, start: int) -> KeyAccount | None:
        """The account of a call from which rows of ``context`` are hidden; None where it is not looked at.

        Args:
            context: the cache, for this call. stream: its name. phase: of the call.
            start: latent frame at which the call's chunk starts.
        """
        looked = self._looked.get((stream, phase)) == start
        account = None if looked else account_of(context, self._keeps_memory, whole=False)
        if account is None:
            return None
        self._looked[stream, phase] = start
        account.of_hidden = True
        account.layers = self._layers.setdefault(stream, account.layers)
        account.layers.looks = True
        account.in_place = self._in_place.setdefault(stream, RowsInPlace())
        if not self._keeps_memory:  # rows may come back from it, in an order that the adapter knows
            account.astray = self._out_of_order(account.places[:, _finished(context)], stream)
        return account

    def _out_of_order(self, now: Tensor, stream: Hashable) -> Tensor | None:
        """Whether rows lie otherwise than at the end of the call before that was looked at; None if none are there."""
        self._looks = True
        before = self._history.get(stream)
        if before is None or not before.numel() or before.shape[0] != now.shape[0]:
            return None
        return out_of_order(before, now)

    def ended(self, context: Context, stream: Hashable, frames: int) -> None:
        """A call from which rows were hidden has come back; ``context`` is as it is now, of its chunk's ``frames``."""
        if self._looks and isinstance(context, CacheRows):
            self._looks, values = False, context.values[0]
            contents = row_contents(values, values.dtype, int(values.shape[-2])).flatten(1)
            self._history[stream] = contents[:, _finished(context, frames)]

    def forget(self) -> None:
        """A new video begins."""
        self._looked.clear()
        self._layers.clear()
        self._in_place.clear()
        self._history.clear()


def _finished(context: CacheRows, more: int = 0) -> slice:
    """Rows of finished frames behind the anchors, and of ``more`` behind them; none if the adapter tells frames."""
    first = context.stop if context.tells_frames else context.start + context.anchors
    return slice(first, first if context.tells_frames else context.stop + more * context.rows_per_frame)
