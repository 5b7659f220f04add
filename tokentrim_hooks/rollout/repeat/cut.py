"""The arguments of a denoiser call, cut to some samples of its batch, and its output put among those of the others.

Nothing is copied that a call may write: what it is given are views, so that it writes into the caches themselves, and
into the rows of its own samples only. What it puts into lists and dicts is carried over once it has come back; a call
that is interrupted has left these as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tokentrim_hooks.pruning.autograd_modes import writing
from tokentrim_hooks.pruning.samples import Samples
from tokentrim_hooks.rollout.repeat.keepers import keeps
from tokentrim_hooks.rollout.repeat.snapshot import tensors_within

DEPTH = 6
"""Lists, dicts and tuples within one another."""


class NotSeparableError(Exception):
    """A call cannot be made for some samples of its batch alone; says why."""


@dataclass(frozen=True)
class _Container:
    """A list or dict, what it became, and by name what was in it and what is now."""

    path: str
    whole: Any
    cut: Any
    items: dict[Any, tuple[Any, Any]]


class CutCall:
    """The arguments of a call for some of its samples.

    Args:
        samples: which. args, kwargs: of the whole batch; neither is written.

    Attributes:
        args, kwargs: for the call. places: where a tensor was cut, in words. tensors: those of the whole batch.

    Raises:
        NotSeparableError: an argument keeps the batch in a way that cannot be cut.
    """

    def __init__(self, samples: Samples, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.samples = samples
        self.places: list[str] = []
        self.tensors: list[Tensor] = []
        self._made: dict[int, tuple[Any, Any]] = {}  # by id: what was given, so that it lives, and what it became
        self._containers: list[_Container] = []
        self._copies: list[tuple[str, Tensor, int]] = []
        self.args = tuple(self._cut(arg, str(place), 0) for place, arg in enumerate(args))
        self.kwargs = {name: self._cut(arg, name, 0) for name, arg in kwargs.items()}

    def _cut(self, thing: Any, path: str, depth: int) -> Any:
        known = self._made.get(id(thing))
        if known is not None:
            return known[1]
        made = self._made_of(thing, path, depth)
        self._made[id(thing)] = (thing, made)
        return made

    def _made_of(self, thing: Any, path: str, depth: int) -> Any:
        if isinstance(thing, Tensor):
            return self._tensor(thing, path)
        if isinstance(thing, (dict, list, tuple)) and depth < DEPTH:
            return self._container(thing, path, depth)
        held = keeps(thing) and not isinstance(thing, nn.Module)
        if held and any(self.samples.fold(tensor) for tensor in tensors_within(thing)):
            raise NotSeparableError(f"argument {path} is a {type(thing).__name__} that holds tensors of the batch")
        return thing

    def _tensor(self, tensor: Tensor, path: str) -> Tensor:
        fold = self.samples.fold(tensor)
        if not fold:
            return tensor
        self.places.append(path)
        self.tensors.append(tensor)
        if fold == 1:
            return self.samples.of(tensor)
        if tensor.is_inference():
            raise NotSeparableError(f"{path} holds {fold} branches in inference mode, where writes are not seen")
        some = self.samples.of_all(tensor).flatten(0, 1).clone()
        self._copies.append((path, some, some._version))
        return some

    def _container(self, thing: Any, path: str, depth: int) -> Any:
        if isinstance(thing, (list, tuple)) and self._is_per_sample(thing):
            self.places.append(f"{path}[]")
            return thing[self.samples.first : self.samples.stop]
        items = dict(thing) if isinstance(thing, dict) else dict(enumerate(thing))
        made = {name: self._cut(item, f"{path}.{name}", depth + 1) for name, item in items.items()}
        if all(made[name] is item for name, item in items.items()):
            return thing  # nothing of it is of the batch: the call may write it as it likes
        if isinstance(thing, tuple):
            parts = made.values()
            return type(thing)(*parts) if hasattr(thing, "_fields") else type(thing)(parts)
        cut = copy.copy(thing)
        for name, part in made.items():
            cut[name] = part
        self._containers.append(_Container(path, thing, cut, {name: (items[name], made[name]) for name in items}))
        return cut

    def _is_per_sample(self, thing: Sequence[Any]) -> bool:
        """Whether a list has an entry for each sample: texts, or tensors that are none of the whole batch."""
        if len(thing) != self.samples.batch or not thing:
            return False
        if all(isinstance(item, str) for item in thing):
            return True
        return all(isinstance(item, Tensor) and item.ndim and not self.samples.fold(item) for item in thing)

    def carry_over(self) -> None:
        """The call has come back: what it has put into lists and dicts goes into those of the whole batch.

        Raises:
            NotSeparableError: it has put something there that is no part of what was; nothing is carried over.
        """
        written = [path for path, some, version in self._copies if some._version != version]
        if written:
            raise NotSeparableError(f"the call writes {written[0]}, in which branches of guidance share a batch")
        # All of them are looked at before any is carried over.
        for whole, name, value, part in [change for each in self._containers for change in self._changes(each)]:
            if not part:
                whole[name] = value
                continue
            place = self.samples.of(whole[name])
            writing(place, place.copy_, value)

    def _changes(self, container: _Container) -> Iterator[tuple[Any, Any, Any, bool]]:
        """What was put where, and whether it is a part of what was there."""
        cut, path = container.cut, container.path
        now = dict(cut) if isinstance(cut, dict) else dict(enumerate(cut))
        if now.keys() != container.items.keys():
            raise NotSeparableError(f"the call adds to {path}, or takes away from it")
        for name, (old, given) in container.items.items():
            new = now[name]
            if new is given:
                continue
            part = given is not old
            fits = isinstance(old, Tensor) and isinstance(new, Tensor) and new.shape == given.shape
            if part and not (fits and self.samples.fold(old) == 1):
                raise NotSeparableError(f"the call puts something of another shape into {path}.{name}")
            yield container.whole, name, new, part

    def among(self, output: Any, whole: Any) -> Any:
        """``whole``, the output of a call with all samples, with those of ``output`` in their places.

        Raises:
            NotSeparableError: the outputs are not built alike.
        """
        (parts, built), (wholes, spec) = tree_flatten(output), tree_flatten(whole)
        if built != spec:
            raise NotSeparableError("the output is built otherwise than that of the whole batch")
        return tree_unflatten([self._placed(new, old) for new, old in zip(parts, wholes, strict=True)], spec)

    def _placed(self, new: Any, old: Any) -> Any:
        if any(new is made for _, made in self._made.values()):
            return old  # an argument that is handed back
        if not isinstance(new, Tensor) or not isinstance(old, Tensor):
            if keeps(new):
                raise NotSeparableError(f"the output holds a {type(new).__name__}")
            return new
        fold = self.samples.fold(old)
        if not fold:
            return new
        if new.shape != (fold * self.samples.count, *old.shape[1:]):
            raise NotSeparableError(f"the output has shape {tuple(new.shape)} beside {tuple(old.shape)} of all")
        placed = old.detach().clone(memory_format=torch.contiguous_format)
        self.samples.of_all(placed).copy_(new.reshape(fold, self.samples.count, *new.shape[1:]))
        return placed
