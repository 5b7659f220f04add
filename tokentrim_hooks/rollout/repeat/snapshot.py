"""What a model and the arguments of a call keep, to be put back after a call that should not have been made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks.pruning.tombstones import clear_marks
from tokentrim_hooks.rollout.repeat.counters import NO_VERSION, put, version_of
from tokentrim_hooks.rollout.repeat.keepers import items_of, keepers_of, keeps

DEPTH = 4
"""Objects, dicts and lists within one another."""
BUDGET = 64 * 2**20
"""Bytes of tensors that are copied: of greater ones (a KV cache) only the reference is kept."""


class Snapshot:
    """All that the roots keep, parameters aside.

    By reference; besides, the contents of small tensors, which may be written in place, and the states of generators.

    Args:
        module: the denoiser. more: arguments and output of the call.
    """

    def __init__(self, module: object, *more: Any) -> None:
        roots = [*keepers_of(module), *(part for part in _containers(more))]
        self._kept = [(keeper, items_of(keeper)) for keeper in _reachable(roots, DEPTH)]
        leaves = list(_leaves([*(items for _, items in self._kept), dict(enumerate(more))]))
        self._tensors = list(_copies(leaves))
        self._generators = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]

    def put_back(self) -> None:
        """Make everything as it was."""
        for keeper, before in self._kept:
            _restore(keeper, before)
        for tensor, copy, version in self._tensors:
            if version == version_of(tensor) != NO_VERSION:
                continue  # untouched, and the model shall not look as if somebody had written
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(copy)
        for generator, state in self._generators:
            generator.set_state(state)


def tensors_within(thing: Any) -> Iterator[Tensor]:
    """Tensors that an object, dict or list keeps, in others within it, too."""
    leaves = _leaves(items_of(keeper) for keeper in _reachable([thing], DEPTH))
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def clear_kept_marks(module: object) -> None:
    """Make finite again what a denoiser keeps beside its cache that was made of marked rows, as a running mean of them.

    Asked where we step aside, for nobody taps it any more. Reads the device.
    """
    for leaf in _leaves(items_of(keeper) for keeper in _reachable(keepers_of(module), DEPTH)):
        if isinstance(leaf, Tensor) and leaf.ndim >= 4 and leaf.is_floating_point() and leaf.numel():
            marks = leaf[..., 0, 0].isposinf()
            if bool(marks.any()) and int(leaf.isfinite().logical_not().sum()) == int(marks.sum()):
                with torch.inference_mode(leaf.is_inference()), torch.no_grad():
                    clear_marks([_once(leaf)])


def _once(tensor: Tensor) -> Tensor:
    """Each element once, of a tensor that was expanded."""
    for dimension, stride in enumerate(tensor.stride()):
        tensor = tensor if stride else tensor.narrow(dimension, 0, 1)
    return tensor


def _containers(things: Iterable[Any]) -> Iterator[Any]:
    """Dicts, lists and objects among the things; in tuples, too."""
    for thing in things:
        if isinstance(thing, tuple):
            yield from _containers(thing)
        elif keeps(thing):
            yield thing


def _reachable(roots: Iterable[Any], depth: int) -> list[Any]:
    found: dict[int, Any] = {}
    level = list(roots)
    for _ in range(depth):
        level = [thing for thing in level if id(thing) not in found]
        found |= {id(thing): thing for thing in level}
        level = [
            part for thing in level if not isinstance(thing, type) for part in _containers(items_of(thing).values())
        ]
    return list(found.values())


def _leaves(kept: Iterable[dict[Any, Any]]) -> Iterator[Any]:
    """Tensors and generators, each once; parameters are nobody's memory."""
    seen: set[int] = set()
    for items in kept:
        for value in items.values():
            for leaf in value if isinstance(value, tuple) else (value,):
                wanted = isinstance(leaf, Tensor | torch.Generator) and not isinstance(leaf, nn.Parameter)
                if wanted and id(leaf) not in seen:
                    seen.add(id(leaf))
                    yield leaf


def _copies(leaves: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Copies of the tensors and their versions, the small ones first, as far as the budget goes."""
    left = BUDGET
    for tensor in sorted((leaf for leaf in leaves if isinstance(leaf, Tensor)), key=lambda t: int(t.nbytes)):
        left -= int(tensor.nbytes)
        if left < 0:
            return
        once = _once(tensor)
        yield once, once.detach().clone(), version_of(once)


def _restore(keeper: Any, before: dict[Any, Any]) -> None:
    now = items_of(keeper)
    if isinstance(keeper, list) and len(now) != len(before):
        keeper[:] = before.values()
        return
    for name, value in before.items():
        if name not in now or now[name] is not value:
            put(keeper, name, value)
    for name in [name for name in now if name not in before]:
        if isinstance(keeper, MutableMapping):
            del keeper[name]
        else:
            delattr(keeper, name)
