"""Whether a row of a KV cache is the same token in every layer: the tap finds the dead ones in the first layer only.

A layer may read fewer rows than the first, but no others of equally many, for the tap goes by their number. If it reads
more, it keeps more than the counters say that were read; and if it reads some of the heads only, the mark in the first
head is not seen with the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedContextError


class LayersAlike:
    """Compares the marks of the layers of calls; the device is read when somebody reads it anyway, or asks.

    Args:
        by_site: whether layers attend per site as well, whose batch and heads are others.

    Attributes:
        looks: whether the call that comes is looked at: rows move as a chunk begins, and in no later call of it.
        most: keys that a layer of the call sees at most; None where that is not known.
    """

    def __init__(self, by_site: bool = False) -> None:
        self.looks = False
        self.most: int | None = None
        self._by_site, self._shape = by_site, (0, 0)
        # By their shape, as the tap shares what it found: a layer may attend over parts of its keys.
        self._firsts: dict[tuple[torch.Size, torch.device], Tensor] = {}
        self._apart: Tensor | None = None

    def begin(self, values: Tensor) -> None:
        """The first layer's V, ``[B, keys, heads, head_dim]``."""
        self._shape = (values.shape[0], values.shape[2])
        self._firsts = {(values.shape[:2], values.device): _marks(values)} if self.looks else {}

    def look(self, values: Tensor) -> None:
        """The V of another attention call, of any layer.

        Raises:
            UnsupportedContextError: it has other heads than the first layer's, or more keys than there can be.
        """
        self._require_like_first(values)
        if not self._firsts or values.shape[0] != self._shape[0]:
            return
        marks = _marks(values)
        apart = (marks != self._firsts.setdefault((values.shape[:2], values.device), marks)).any()
        self._apart = apart if self._apart is None else self._apart.to(apart.device) | apart

    def _require_like_first(self, values: Tensor) -> None:
        batch, keys, heads = values.shape[:3]
        if self._by_site and batch != self._shape[0]:
            return
        if (batch, heads) != self._shape:
            raise UnsupportedContextError(
                f"a layer attends with {heads} heads of {batch} samples, the first with {self._shape[1]} of "
                f"{self._shape[0]}.\nA row must be in all heads, or some see other keys: write an adapter."
            )
        if self.most is not None and keys > self.most:
            raise UnsupportedContextError(
                f"a layer sees {keys} keys where {self.most} are known: its KV cache keeps more frames than the first "
                "layer's.\nUse one window for all layers, or write an adapter for this fork."
            )

    @property
    def waiting(self) -> Tensor | None:
        """Whether layers were found to differ, BoolTensor ``[]`` on the device; None where none was compared."""
        return self._apart

    def require(self, apart: bool | None = None) -> None:
        """Forget the flag, and raise if it is set.

        Args:
            apart: what was read of :attr:`waiting`; None to read it now, which is a synchronisation.

        Raises:
            UnsupportedContextError: layers have marks in different rows.
        """
        flag, self._apart = self._apart, None
        if bool(flag) if apart is None and flag is not None else apart:
            raise UnsupportedContextError(
                "layers keep different rows in the same places of their KV caches (each chooses its own?).\n"
                "Tokens are not where they are looked for: write an adapter for this fork."
            )


def _marks(values: Tensor) -> Tensor:
    """Rows of V that carry a mark, and are not infinite or NaN all over as those of a model that has diverged."""
    two = values[:, :, 0, :2].float().isfinite()
    return ~two[..., 0] & two[..., 1]
