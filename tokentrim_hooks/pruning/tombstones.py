"""Marks for dead rows of a KV cache: one infinite element in the V row of a dead token.

The mark travels with the row through native rolls, sinks and copies, dies when the row is overwritten, and poisons the
output loudly if an attention path was missed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.pruning.autograd_modes import writing
from tokentrim_hooks.pruning.context import CacheRows, require_floating, require_rows

FOREIGN_MARKS = (
    "this video goes on from a copy of a KV cache in which an earlier patch had pruned tokens; they stay pruned. "
    "tokentrim.unmark(cache) brings them back"
)


def mark_of(dtype: torch.dtype) -> float:
    """Value of a tombstone: +inf, or NaN where the type has no infinity (fp8 ``*fn`` types)."""
    return float("nan") if "float8" in str(dtype) and "fn" in str(dtype) else float("inf")


def alive_rows(values: Tensor) -> Tensor:
    """Rows of V ``[B, rows..., heads, head_dim]`` without a tombstone: BoolTensor ``[B, rows...]`` on the device."""
    element = values[..., 0, 0]
    # As isfinite, which is four operations. Types of one byte are not compared as they are.
    return (element if element.dtype.itemsize > 1 else element.float()).abs() < math.inf


def hidden_rows(values: Tensor) -> Tensor:
    """Rows of V that are hidden from one call (see fleeting.py): BoolTensor ``[B, rows...]`` on the device."""
    return torch.isneginf(values[..., 0, 0].float())


def is_marked(values: Any) -> bool:
    """Whether V has a tombstone anywhere; False for what is no tensor. Reads the device."""
    return isinstance(values, Tensor) and not bool(alive_rows(values).all())


@dataclass
class Tombstones:
    """Marks in the V rows of one or more KV caches, and what they replaced, for as long as rows have not moved.

    The caches are not kept alive: a sampler may put other memory in their place, and that is known by their end.
    """

    replaced: list[tuple[Traces, tuple[Any, ...], Tensor, Hashable]] = field(default_factory=list)

    def mark(
        self, rows: CacheRows, tokens: Sequence[Sequence[int]], prune_anchors: bool = False, owner: Hashable = None
    ) -> int:
        """Mark all cached positions of ``tokens`` (one list per sample; empty = spare it); return rows marked.

        ``owner`` names the cache, for :meth:`follow`.
        """
        require_floating(rows.values)
        require_rows(rows)
        first = rows.start if prune_anchors else rows.start + rows.anchors
        sample, row = _positions(tokens, first, rows.stop, rows.rows_per_frame, range(*rows.current))
        if not sample:
            return 0
        places = torch.tensor([sample, row])
        on_device = {device: places.to(device) for device in {values.device for values in rows.values}}
        for values in rows.values:
            index = marked_element(values, on_device[values.device], rows.rows_per_frame)
            self.replaced.append((Traces.of([values]), index, values[index].clone(), owner))
            values[index] = mark_of(values.dtype)
        return len(sample)

    def follow(self, values: Sequence[Tensor], owner: Hashable) -> None:
        """The rows of a cache lie in other memory by now: ``values``, of each layer, as they were marked."""
        own = [place for place, (*_, name) in enumerate(self.replaced) if name == owner]
        for number, place in enumerate(own):
            _, index, old, _ = self.replaced[place]
            self.replaced[place] = Traces.of([values[number % len(values)]]), index, old, owner

    def revive(self) -> None:
        """Put back what the marks replaced. Only valid while no row has moved since."""
        for traces, index, old, _ in reversed(self.replaced):
            traces.put(index, old)
        self.replaced.clear()

    def settle(self) -> None:
        """Forget what the marks replaced: they are final."""
        self.replaced.clear()


def marked_element(values: Tensor, places: Tensor, per_frame: int) -> tuple[Any, ...]:
    """Index of the marked element of rows of V: by (sample, row), or by (sample, frame, token) in a view by frames."""
    sample, row = places
    if values.ndim == 4:
        return sample, row, 0, 0
    if values.ndim != 5 or values.shape[2] != per_frame:
        raise UnsupportedContextError(
            f"values of shape {tuple(values.shape)} are neither [B, rows, heads, head_dim] nor "
            f"[B, frames, {per_frame}, heads, head_dim]; correct the adapter's context()"
        )
    return sample, row // per_frame, row % per_frame, 0, 0


def _positions(
    tokens: Sequence[Sequence[int]], first: int, stop: int, per_frame: int, spared: range
) -> tuple[list[int], list[int]]:
    """(sample, row) of every cached copy of the tokens in rows ``first..stop`` but not in ``spared``."""
    if first % per_frame:
        raise UnsupportedContextError(
            f"history starts at row {first}, not at a frame of {per_frame} rows; "
            "correct context()"
        )
    pairs = [
        (sample, frame + token)
        for sample, chosen in enumerate(tokens)
        for frame in range(first, stop, per_frame)
        for token in chosen
        if frame + token < stop and frame + token not in spared
    ]
    return [sample for sample, _ in pairs], [row for _, row in pairs]


@dataclass(frozen=True)
class Traces:
    """Where marks lie, without keeping the memory alive: weak references to the storages, for tensors may be views."""

    places: tuple[tuple[weakref.ref[torch.UntypedStorage], torch.dtype, int, torch.Size, tuple[int, ...]], ...]

    @classmethod
    def of(cls, values: Iterable[Tensor]) -> Traces:
        """Remember the V tensors of a cache."""
        return cls(
            tuple(
                (weakref.ref(v.untyped_storage()), v.dtype, int(v.storage_offset()), v.size(), v.stride())
                for v in values
            )
        )

    @property
    def lost(self) -> bool:
        """Whether some of the memory is gone: a cache that makes its tensors anew has taken its marks elsewhere."""
        return any(storage() is None for storage, *_ in self.places)

    @property
    def empty(self) -> bool:
        """Whether no mark is left: all have rolled out of the cache or were overwritten. Reads the device."""
        alive = [alive_rows(values).all() for values in self._values()]
        return not alive or bool(torch.stack([flag.to(alive[0].device) for flag in alive]).all())

    def put(self, index: tuple[Any, ...], elements: Tensor) -> None:
        """Write into what is left of the tensors."""
        for values in self._values():
            values[index] = elements

    def clear(self) -> None:
        """Make what is left finite again."""
        clear_marks(self._values())

    def clear_copies(self, memo: dict[int, Any]) -> None:
        """While something that holds the cache is copied by ``copy.deepcopy``: let its copy carry no mark.

        Args:
            memo: of ``copy.deepcopy``, in which torch keeps the copies of storages, made already or still to come.
        """
        copies = memo.setdefault("torch", {})  # type: ignore[call-overload]
        for storage, dtype, offset, size, stride in self.places:
            memory = storage()
            if memory is not None:
                if memory._cdata not in copies:
                    copies[memory._cdata] = memory.clone()  # type: ignore[no-untyped-call]
                copied = copies[memory._cdata]
                clear_marks([torch.empty(0, dtype=dtype, device=copied.device).set_(copied, offset, size, stride)])

    def _values(self) -> Iterator[Tensor]:
        """The tensors, made anew: those of inference mode could not be written."""
        for storage, dtype, offset, size, stride in self.places:
            memory = storage()
            if memory is not None:
                yield torch.empty(0, dtype=dtype, device=memory.device).set_(memory, offset, size, stride)


def clear_marks(values: Iterable[Tensor]) -> None:
    """Make rows whose mark cannot be undone finite again (0 in the marked element), so that nothing is poisoned."""
    for value in values:
        element = value[..., 0, 0]
        element.copy_(torch.where(torch.isfinite(element.float()), element, torch.zeros_like(element)))


def unmark(cache: Any) -> int:
    """Bring back what is pruned in a copy of a KV cache, in place.

    For copies (``copy.deepcopy``, ``clone``, ``torch.save``) that were made while something was dead, and are to be
    read by a model that is not patched: a mark is an infinite element in the V row of a dead token, and makes attention
    answer NaN. It becomes 0, for nobody knows what was there.

    Args:
        cache: tensors of any shape in lists, tuples, dicts and attributes of objects, within one another.

    Returns:
        Marks taken off, one for each dead row in each layer.
    """
    return sum(_unmarked(tensor) for tensor in _tensors_in(cache, set()))


def _unmarked(tensor: Tensor) -> int:
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    marks = wide.isposinf() if mark_of(tensor.dtype) == float("inf") else wide.isnan()
    writing(tensor, lambda: tensor.copy_(torch.where(marks, torch.zeros_like(wide), wide)))
    return int(marks.sum())


def _tensors_in(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield from (thing,) if thing.is_floating_point() else ()
    elif isinstance(thing, Mapping):
        for part in thing.values():
            yield from _tensors_in(part, seen)
    elif isinstance(thing, list | tuple | set):
        for part in thing:
            yield from _tensors_in(part, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from _tensors_in(vars(thing), seen)
