"""Rows of a KV cache that one call may not read: marks in V that come off when the call has ended, whatever ends it.

They are -inf where tombstones are +inf, so the tap leaves both out and only these come off. A call may roll its cache:
then the marks have moved with their rows, and each original goes back to the row that it came from. Which one that is
the order of rows says; where it cannot be told from that, as when a call was interrupted between a roll and a write,
other elements of the row do, which no mark has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.pruning.context import CacheRows, require_floating
from tokentrim_hooks.pruning.tombstones import marked_element


@dataclass(frozen=True)
class _Hidden:
    """Marks in one layer: V, the index of the marked elements, what they replaced, and by what rows are known."""

    values: Tensor
    index: tuple[Any, ...]
    old: Tensor
    tags: Tensor


class FleetingMarks:
    """Hides rows of a cache from one call.

    Attributes:
        rows: rows that are hidden, in one layer, of all samples; 0 while nothing is.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._layers: list[_Hidden] = []
        self._places: list[tuple[int, int]] = []
        self._context: CacheRows | None = None

    def hide(self, context: CacheRows, hidden: Tensor) -> int:
        """Mark rows.

        Args:
            context: where the rows lie.
            hidden: CPU BoolTensor ``[B, frames, tokens]``, frames in the order of ``context.frame_rows``.

        Returns:
            Number of rows hidden, of all samples.

        Raises:
            UnsupportedContextError: the cache holds whole numbers, or a type without infinity.
        """
        self._places = _places(context, hidden)
        if not self._places:
            return 0
        require_floating(context.values)
        if any("float8" in str(values.dtype) for values in context.values):
            raise UnsupportedContextError(
                "the KV cache holds float8, which has no infinity to hide rows with for one call; "
                "run with a wider cache, or with policies that only prune"
            )
        self._context, self.rows = context, len(self._places)
        pairs = torch.tensor(self._places).T
        on_device = {device: pairs.to(device) for device in {values.device for values in context.values}}
        with torch.no_grad():
            for values in context.values:
                index = marked_element(values, on_device[values.device], context.rows_per_frame)
                # Remembered before it is marked: whatever interrupts the marking, the marks come off.
                old = values[index]
                self._layers.append(_Hidden(values, index, old, _tags(values)[index[:-2]]))
                values[index] = torch.where(torch.isfinite(old), float("-inf"), old)
        return self.rows

    def forget(self) -> None:
        """Leave the marks where they are: in copies, which are dropped."""
        self._layers, self._context, self.rows = [], None, 0

    def take_off(self, now: CacheRows | None = None) -> None:
        """Put back what the marks replaced.

        Args:
            now: the context as it is after the call; None where nobody can say (the call has raised). Without it, or
                where rows have moved, the device is read to find them.
        """
        layers, context, self._layers, self.rows = self._layers, self._context, [], 0
        if context is None:
            return
        self._context = None
        moved = now is None or _has_moved(context, now)
        tensors = [layer.values for layer in layers] if now is None or not moved else list(now.values)
        anchors = range(context.start, context.start + context.anchors)
        for layer, values in zip(layers, tensors, strict=True):
            with torch.inference_mode(values.is_inference()), torch.no_grad():
                if moved:
                    _put_back_moved(layer.old, layer.tags, self._places, values, anchors)
                else:
                    _put_back(layer, values)


def _places(context: CacheRows, hidden: Tensor) -> list[tuple[int, int]]:
    """(sample, row) of all that is hidden, in the order of rows."""
    first = torch.tensor(context.frame_rows)
    sample, frame, token = hidden.nonzero(as_tuple=True)
    return sorted(zip(sample.tolist(), (first[frame] + token).tolist(), strict=True)) if len(first) else []


def _has_moved(before: CacheRows, after: CacheRows) -> bool:
    """Whether rows lie elsewhere than before the call: a roll evicts, and so changes what is left of the history."""
    same = (before.start, before.stop, before.anchors) == (after.start, after.stop, after.anchors)
    return not same or any(_place(a) != _place(b) for a, b in zip(before.values, after.values, strict=True))


def _place(values: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return values.data_ptr(), values.shape, values.stride()


def _put_back(layer: _Hidden, values: Tensor) -> None:
    """Rows are where they were; one that was overwritten carries no mark and stays as it is."""
    current = values[layer.index]
    values[layer.index] = torch.where(torch.isneginf(current), layer.old, current)


def _tags(values: Tensor) -> Tensor:
    """What rows are known by, whatever is marked: up to four elements of each, ``[B, rows..., 4]``."""
    return values[..., -1, 1:][..., -4:]


def _put_back_moved(
    old: Tensor, tags: Tensor, places: Sequence[tuple[int, int]], values: Tensor, anchors: range
) -> None:
    """Rows have rolled: by their order, or where that cannot be by their tags, each gets its original back."""
    for sample in {sample for sample, _ in places}:
        elements = values[sample][..., 0, 0]  # by row, or by frame and token
        marked = torch.isneginf(elements).nonzero(as_tuple=True)
        found = _tags(values[sample])[marked]
        mine = [n for n, (owner, _) in enumerate(places) if owner == sample]
        source = _by_order(mine, places, len(found), anchors)
        if source is None or not torch.equal(tags[torch.tensor(source, dtype=torch.long, device=tags.device)], found):
            source = _by_tags(mine, tags, found)
        if source is None:
            elements[marked] = 0
            raise UnsupportedContextError(
                f"{len(found)} rows of the KV cache are hidden where {len(mine)} were: this model makes rows of others "
                "during a call, so nothing can be hidden from it"
            )
        elements[marked] = old[torch.tensor(source, dtype=torch.long, device=old.device)]


def _by_order(mine: list[int], places: Sequence[tuple[int, int]], count: int, anchors: range) -> list[int] | None:
    """Which places ``count`` marked rows had: those that follow the anchors were evicted first, the others in order."""
    kept = [n for n in mine if places[n][1] in anchors]
    rolling = [n for n in mine if places[n][1] not in anchors]
    left = count - len(kept)
    return [*kept, *rolling[len(rolling) - left :]] if 0 <= left <= len(rolling) else None


def _by_tags(mine: list[int], tags: Tensor, found: Tensor) -> list[int] | None:
    """Which places marked rows had, one by one: rows that were copied are known as well; None if one is unknown."""
    known = {tuple(tag): n for tag, n in zip(tags[mine].tolist(), mine, strict=True)}
    source = [known.get(tuple(tag)) for tag in found.tolist()]
    return None if None in source else source  # type: ignore[return-value]  # mypy does not see that none is in it
