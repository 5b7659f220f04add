"""Accounts for the keys of calls from which rows of a KV cache are hidden, as account.py does where rows are dead.

What is hidden comes back when the call has ended, so nothing of it lives on in rows, and an account is of one call
alone: its keys are rows that the cache holds as it begins, or the chunk's own. That is looked at once per chunk and
kind of call; calls between them are taken to read as it did.
"""

from __future__ import annotations

from collections.abc import Hashable

from tokentrim_hooks.pruning.account import KeyAccount
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.pruning.layers import LayersAlike
from tokentrim_hooks.pruning.sparing import account_of


class AccountsOfHidden:
    """Which calls are looked at, and what they left to be told at the next: layers with their marks in other rows.

    Args:
        keeps_memory: whether keys may be memory beside the rows, which the adapter keeps right.
    """

    def __init__(self, keeps_memory: bool) -> None:
        self._keeps_memory = keeps_memory
        self._looked: dict[tuple[Hashable, str], int] = {}
        self._layers: dict[Hashable, LayersAlike] = {}

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
        return account

    def forget(self) -> None:
        """A new video begins."""
        self._looked.clear()
        self._layers.clear()
