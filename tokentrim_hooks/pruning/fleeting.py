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
from tokentrim_hooks.pruning.autograd_modes import without_gradients, writing
from tokentrim_hooks.pruning.context import CacheRows, require_floating, require_rows
from tokentrim_hooks.pruning.tombstones import marked_element


@dataclass(frozen=True)
class _Hidden:
    """Marks in one layer: V, the index of the marked elements, what they replaced, and by what rows are known."""

    values: Tensor
    index: tuple[Any, ...]
    old: Tensor
    tags: Tensor


@dataclass(frozen=True)
class Weighed:
    """Rows of a kernel that are read with less weight, the same in every layer.

    Attributes:
        weights: of all keys, ``[B, length]`` on the CPU; 0 for those that are hidden. on_device: the same.
        sample, row: of each marked key. source: ordinal of the row that it is.
    """

    weights: Tensor
    on_device: Tensor
    sample: Tensor
    row: Tensor
    source: Tensor


_NOT_BY_LAYER = (
    "this model's attention does not read its KV cache layer by layer, row for row, so rows cannot be weighed; "
    "let hide() answer True and False"
)


class FleetingMarks:
    """Hides rows of a cache from one call.

    Args:
        beside_memory: whether keys may be memory beside the rows: then their number says nothing of rows.

    Attributes:
        rows: rows that are hidden, in one layer, of all samples; 0 while nothing is.
        weights: of each of them, what the call reads: 0 nothing, below 1 less than of others; empty if all are 0.
        context: where they lie; None while nothing is hidden.
    """

    def __init__(self, beside_memory: bool = False) -> None:
        self.rows, self._beside_memory = 0, beside_memory
        self.weights: list[float] = []
        self._layers: list[_Hidden] = []
        self._places: list[tuple[int, int]] = []
        self.context: CacheRows | None = None

    def hide(self, context: CacheRows, hidden: Tensor, weights: Tensor | None = None) -> int:
        """Mark rows.

        Args:
            context: where the rows lie.
            hidden: CPU BoolTensor ``[B, frames, tokens]``, frames in the order of ``context.frame_rows``.
            weights: of all tokens, CPU ``[B, frames, tokens]``; those below 1 are marked, too, and read by the tap.

        Returns:
            Number of rows hidden, of all samples.

        Raises:
            UnsupportedContextError: the cache holds whole numbers, or a type without infinity.
        """
        marked = hidden if weights is None else hidden | (weights < 1)
        self._places = _places(context, marked)
        if not self._places:
            return 0
        read = None if weights is None else torch.where(hidden, 0, weights)
        self.weights = [] if read is None else _in_order_of_rows(context, marked, read)
        require_floating(context.values)
        require_rows(context)
        if any("float8" in str(values.dtype) for values in context.values):
            raise UnsupportedContextError(
                "the KV cache holds float8, which has no infinity to hide rows with for one call; "
                "run with a wider cache, or with policies that only prune"
            )
        self.context, self.rows = context, len(self._places)
        pairs = torch.tensor(self._places).T
        on_device = {device: pairs.to(device) for device in {values.device for values in context.values}}
        for values in context.values:
            index = marked_element(values, on_device[values.device], context.rows_per_frame)
            without_gradients(self._mark, values, index)
        return self.rows

    def _mark(self, values: Tensor, index: tuple[Any, ...]) -> None:
        # Remembered before it is marked: whatever interrupts the marking, the marks come off.
        old = values[index]
        self._layers.append(_Hidden(values, index, old, _tags(values)[index[:-2]]))
        values[index] = torch.where(torch.isfinite(old), float("-inf"), old)

    def require_seen(self, open_rows: Tensor, new: int) -> None:
        """Raise if a call that reads all rows does not find all of those that are hidden.

        Args:
            open_rows: keys of its first attention that carry no mark of any kind: CPU BoolTensor ``[B, keys]``.
            new: keys that are the chunk's own.

        Raises:
            UnsupportedContextError: marks were lost on the way, with what they lie in.
        """
        found = int((~open_rows).sum())
        if self.context is None or self._beside_memory or found >= self.rows:
            return
        if open_rows.shape[1] != self.context.stop + new:
            return
        raise UnsupportedContextError(
            f"attention finds {found} of {self.rows} rows that are hidden from a call: V is changed as it is read, or "
            "overwritten.\nLeave policies that hide out, or write an adapter for this fork."
        )

    def forget(self) -> None:
        """Leave the marks where they are: in copies, which are dropped."""
        self._layers, self.context, self.rows, self.weights = [], None, 0, []

    def locate(self, layer: int, values: Tensor) -> Weighed | None:
        """Where V ``[B, length, heads, head_dim]`` at a layer's kernel has rows of less weight; None if none has any.

        Reads the device.

        Raises:
            UnsupportedContextError: rows of the kernel are none of the cache's.
        """
        if not self.weights or self.context is None:
            return None
        if values.ndim != 4 or len(self._layers) <= layer or values.shape[0] != self._layers[layer].values.shape[0]:
            raise UnsupportedContextError(_NOT_BY_LAYER)
        anchors = range(self.context.start, self.context.start + self.context.anchors)
        weights, found = torch.ones(values.shape[:2]), list[tuple[int, int, int]]()
        for one, elements in enumerate(values[..., 0, 0]):
            marked = torch.isneginf(elements).nonzero()[:, 0]
            places = _sources(self._layers[layer].tags, self._places, one, _tags(values[one])[marked], anchors)
            if places is None:
                raise UnsupportedContextError(_NOT_BY_LAYER)
            rows = marked.tolist()
            weights[one, rows] = torch.tensor([self.weights[n] for n in places])
            found += [(one, row, place) for row, place in zip(rows, places, strict=True)]
        index = torch.tensor(found, dtype=torch.long).view(-1, 3).T.to(values.device)
        return Weighed(weights, weights.to(values), *index)

    def weighed(self, layer: int, values: Tensor, rows: Weighed) -> Tensor:
        """V of a layer with its own elements in the place of marks, times the weights, and these behind it as one more
        channel: ``[B, length, heads, head_dim + 1]``. NaN where the rows are not those of the layer that was located.
        """
        if len(self._layers) <= layer:
            raise UnsupportedContextError(_NOT_BY_LAYER)
        hidden, whole = self._layers[layer], values.clone()
        same = (_tags(values)[rows.sample, rows.row] == hidden.tags[rows.source]).all(-1)
        whole[rows.sample, rows.row, 0, 0] = torch.where(same, hidden.old[rows.source], float("nan"))
        weights = rows.on_device[:, :, None, None].expand(*whole.shape[:3], 1)
        return torch.cat([whole * weights, weights], dim=-1)

    def take_off(self, now: CacheRows | None = None) -> None:
        """Put back what the marks replaced.

        Args:
            now: the context as it is after the call; None where nobody can say (the call has raised). Without it, or
                where rows have moved, the device is read to find them.
        """
        context = self.context
        if context is None:
            self.forget()
            return
        moved = now is None or _has_moved(context, now)
        tensors = [layer.values for layer in self._layers] if now is None or not moved else list(now.values)
        anchors = range(context.start, context.start + context.anchors)
        failure = None
        for layer, values in reversed(list(zip(self._layers, tensors, strict=True))):
            try:
                if moved:
                    writing(values, _put_back_moved, layer.old, layer.tags, self._places, values, anchors)
                else:
                    writing(values, _put_back, layer, values)
            except UnsupportedContextError as why:
                failure = why  # of all layers alike: none may keep its marks
            # Not before: what Ctrl-C leaves here is taken off where the next call begins.
            del self._layers[-1]
        self.forget()
        if failure is not None:
            raise failure


def _places(context: CacheRows, hidden: Tensor) -> list[tuple[int, int]]:
    """(sample, row) of all that is hidden, in the order of rows."""
    first = torch.tensor(context.frame_rows)
    sample, frame, token = hidden.nonzero(as_tuple=True)
    return sorted(zip(sample.tolist(), (first[frame] + token).tolist(), strict=True)) if len(first) else []


def _in_order_of_rows(context: CacheRows, marked: Tensor, weights: Tensor) -> list[float]:
    """Weights of all that is marked, as :func:`_places` has them."""
    sample, frame, token = marked.nonzero(as_tuple=True)
    rows = (torch.tensor(context.frame_rows)[frame] + token).tolist()
    ordered = sorted(zip(sample.tolist(), rows, weights[sample, frame, token].tolist(), strict=True))
    return [weight for _, _, weight in ordered]


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
        source = _sources(tags, places, sample, found, anchors)
        if source is None:
            elements[marked] = 0
            raise UnsupportedContextError(
                f"{len(found)} rows of the KV cache are hidden, and not all are those that were: this model makes rows "
                "of others during a call, so leave policies that hide out"
            )
        elements[marked] = old[torch.tensor(source, dtype=torch.long, device=old.device)]


def _sources(
    tags: Tensor, places: Sequence[tuple[int, int]], sample: int, found: Tensor, anchors: range
) -> list[int] | None:
    """Which places the marked rows of a sample had, known by their tags ``found``; None if one had none."""
    mine = [n for n, (owner, _) in enumerate(places) if owner == sample]
    source = _by_order(mine, places, len(found), anchors)
    if source is None or not torch.equal(tags[torch.tensor(source, dtype=torch.long, device=tags.device)], found):
        return _by_tags(mine, tags, found)
    return source


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
