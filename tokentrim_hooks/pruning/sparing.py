"""The account of a cache beside which a model keeps other memory, whose adapter keeps that right (``keeps_memory``).

Keys that were never rows are that memory, and are not asked about. What an adapter cannot answer for is where tokens
are: a key of which one head is a row and another is not was put together head by head, and then a mark, which lies in
the first head, kills what nobody has pruned in the others. Layers, and frames of which some rows are gone, are looked
at as ever.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.pruning.account import KeyAccount, keeps_contents
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.pruning.samples import Samples


def account_of(context: CacheRows, keeps_memory: bool, whole: bool = True) -> KeyAccount | None:
    """The account of a cache, for the call that follows; None where its rows cannot be known by their content.

    Args:
        keeps_memory: whether keys may be memory beside the rows, which the adapter keeps right.
        whole: as of any account.
    """
    if not keeps_contents(context):
        return None
    return SparingAccount(context, whole) if keeps_memory else KeyAccount(context, whole)


class SparingAccount(KeyAccount):
    """The rows of one cache behind its sink, by the content of their first head and by that of all heads.

    Args:
        context: the cache, for the call that follows. whole: as of any account.
    """

    def __init__(self, context: CacheRows, whole: bool = True) -> None:
        self._first = KeyAccount(_first_heads(_history(context)), whole=False)
        super().__init__(context, whole)

    def begin(self, start: int) -> None:
        """As of any account."""
        super().begin(start)
        self._first.begin(start)

    def read(self, context: CacheRows) -> None:
        """Know the rows behind the sink: a sink may be blended into row by row, which is memory too."""
        history = _history(context)
        super().read(history)
        self._first.read(_first_heads(history))

    def known(self, values: Tensor, new: int, part: Samples | None = None) -> Tensor:
        """Which keys are rows, or memory in all of their heads: BoolTensor ``[B, keys]``; arguments as of any."""
        found, first = super().known(values, new, part), self._first.known(values[..., :1, :], new, part)
        thorough, of_first = self.second_look(), self._first.second_look()
        if thorough is not None:
            self._thorough = lambda: thorough() | ~(first if of_first is None else of_first())
        return found | ~first

    def require(
        self, alive: Tensor, known: Tensor, new: int, padded: bool = False, part: Samples | None = None
    ) -> None:
        """Raise if something is dead, and keys are rows in some heads only; arguments as of any.

        Raises:
            UnsupportedContextError: there are such keys.
        """
        thorough = self.second_look()
        # With memory among the keys their number says nothing of rows, but that no layer has more than the first.
        self.layers.most = int(alive.shape[1])
        if bool(alive.all()) or bool(known.all()):
            return
        if self.in_place:
            self.in_place.holds = False
        if thorough is not None and bool(thorough().all()):
            return
        raise UnsupportedContextError(
            f"{int((~known).sum())} keys in self attention are rows of the KV cache in some heads only (each head "
            "chooses its own?).\nTokens are not where they are looked for: write an adapter for this fork."
        )


def _history(context: CacheRows) -> CacheRows:
    """The rows of finished frames behind the sink; all rows where these cannot be told, or there are none."""
    first, values = context.start + context.anchors, context.values[0]
    if values.ndim != 4 or first >= context.stop:
        return context
    return replace(context, values=[values[:, first : context.stop]], start=0, stop=context.stop - first, anchors=0)


def _first_heads(context: CacheRows) -> CacheRows:
    return replace(context, values=[context.values[0][..., :1, :]])
