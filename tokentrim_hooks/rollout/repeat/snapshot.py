"""What a model and the arguments of a call keep, to be put back after a call that should not have been made."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks.pruning.autograd_modes import writing
from tokentrim_hooks.pruning.tombstones import clear_marks
from tokentrim_hooks.rollout.repeat.counts import NO_VERSION, version_of
from tokentrim_hooks.rollout.repeat.keepers import containers, is_ours, items_of, keepers_of, put, reachable, take_out

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
        roots = [*keepers_of(module), *(part for part in containers(more))]
        self._kept = [(keeper, label, items_of(keeper)) for keeper, label in reachable(roots, DEPTH)]
        leaves = list(_leaves([*(items for _, _, items in self._kept), dict(enumerate(more))]))
        tensors = sorted((leaf for leaf in leaves if isinstance(leaf, Tensor)), key=lambda tensor: int(tensor.nbytes))
        # The small ones first, as far as the budget goes.
        few = sum(total <= BUDGET for total in itertools.accumulate(int(tensor.nbytes) for tensor in tensors))
        self._tensors = [(once, once.detach().clone(), version_of(once)) for once in map(_once, tensors[:few])]
        self._large = [(tensor, version_of(tensor)) for tensor in tensors[few:]]
        self._given = [leaf for thing in more for leaf in (thing, *tensors_within(thing)) if isinstance(leaf, Tensor)]
        self._generators = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]

    def put_back(self) -> None:
        """Make everything as it was."""
        for keeper, _, before in self._kept:
            _restore(keeper, before)
        for tensor, copy, version in self._tensors:
            if version == version_of(tensor) != NO_VERSION:
                continue  # untouched, and the model shall not look as if somebody had written
            writing(tensor, tensor.copy_, copy)
        for generator, state in self._generators:
            generator.set_state(state)

    def is_short(self) -> bool:
        """Whether something may have been written that was too large to be copied, and so was not put back."""
        return any(version == NO_VERSION or version != version_of(tensor) for tensor, version in self._large)

    def writes_to(self, tensor: Tensor) -> bool:
        """Whether something else is in it by now; False for what is too large to have been copied."""
        copies = (copy for kept, copy, _ in self._tensors if kept is tensor)
        return any(not torch.equal(copy, tensor) for copy in copies)

    def moved(self) -> dict[str, Tensor]:
        """Tensors that the model itself keeps and that are other ones by now, by name: how far, of their largest value.

        Not those that calls are given: a cache is written once more, and what it holds then shows in the output.
        """
        known = {id(tensor) for tensor in self._given}
        copies = {id(tensor): (copy, version) for tensor, copy, version in self._tensors}
        found = {}
        for keeper, label, before in self._kept:
            tensors = {name: value for name, value in before.items() if id(value) in copies and id(value) not in known}
            now = items_of(keeper) if tensors else {}
            for name, value in tensors.items():
                copy, version = copies[id(value)]
                new = now.get(name)
                if isinstance(new, Tensor) and not (new is value and version == version_of(new) != NO_VERSION):
                    found[f"{label}.{name}"] = _moved(copy, _once(new))
        return found


def _moved(old: Tensor, new: Tensor) -> Tensor:
    if old.shape != new.shape:
        return torch.full((), torch.inf, device=old.device)
    # Not promoted: float8 has no wider type that torch would name.
    wide = old.dtype if old.is_complex() or old.dtype == torch.float64 else torch.float32
    before, now = old.to(wide), new.to(wide)
    same = (before == now) | (before.isnan() & now.isnan())
    distance, scale = torch.where(same, 0, before - now).abs(), torch.where(before.isfinite(), before, 0).abs()
    return (distance.amax() / scale.amax().clamp_min(1e-30)).float() if distance.numel() else distance.sum().float()


def tensors_within(thing: Any) -> Iterator[Tensor]:
    """Tensors that an object, dict or list keeps, in others within it, too."""
    leaves = _leaves(items_of(keeper) for keeper, _ in reachable([thing], DEPTH))
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def clear_kept_marks(module: object) -> None:
    """Make finite again what a denoiser keeps beside its cache that was made of marked rows, as a running mean of them.

    Asked where we step aside, for nobody taps it any more. Reads the device.
    """
    for leaf in _leaves(items_of(keeper) for keeper, _ in reachable(keepers_of(module), DEPTH)):
        if isinstance(leaf, Tensor) and leaf.ndim >= 4 and leaf.is_floating_point() and leaf.numel():
            marks = leaf[..., 0, 0].isposinf()
            if bool(marks.any()) and int(leaf.isfinite().logical_not().sum()) == int(marks.sum()):
                writing(leaf, clear_marks, [_once(leaf)])


def _once(tensor: Tensor) -> Tensor:
    """Each element once, of a tensor that was expanded."""
    for dimension, stride in enumerate(tensor.stride()):
        tensor = tensor if stride else tensor.narrow(dimension, 0, 1)
    return tensor


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


def _restore(keeper: Any, before: dict[Any, Any]) -> None:
    now = items_of(keeper)
    if isinstance(keeper, list) and len(now) != len(before):
        keeper[:] = before.values()
        return
    # What is ours comes and goes with a patch, which may have come off in the call.
    ours = {name for items in (before, now) for name, value in items.items() if is_ours(value)}
    for name, value in before.items():
        if name not in ours and (name not in now or now[name] is not value):
            put(keeper, name, value)
    for name in [name for name in now if name not in before and name not in ours]:
        take_out(keeper, name)
