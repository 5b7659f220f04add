"""Where a model counts its calls: numbers in what it keeps."""

from __future__ import annotations

import ast
import itertools
import numbers
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.rollout.repeat.keepers import items_of, keepers_of

PLAIN = (numbers.Number, str)
NO_VERSION = -1


class Counters:
    """What a module and its parts count in now, to be compared later and put back."""

    def __init__(self, module: object) -> None:
        self._kept = [(keeper, _counts_of(keeper)) for keeper in keepers_of(module)]

    def put_back(self) -> list[str]:
        """Put back what has changed since; returns the names of it."""
        changed = []
        for keeper, before in self._kept:
            now = items_of(keeper) if before else {}
            for name in [name for name, count in before.items() if name in now and count.differs(now[name])]:
                put(keeper, name, before[name].restored())
                kind = keeper if hasattr(keeper, "__name__") else type(keeper)
                changed.append(f"{kind.__name__}.{name}")
        return sorted(set(changed))


class Count:
    """A number or a text that a model keeps: plain, the next one of ``itertools.count``, or in a tensor of its own."""

    def __init__(self, value: Any) -> None:
        self._value = value
        if isinstance(value, itertools.count):
            # Copies of it are not to be had in newer versions of Python.
            self._next = repr(value)
        elif isinstance(value, Tensor):
            self._number, self._version = value.detach().clone(), version_of(value)

    @classmethod
    def can_be(cls, value: Any) -> bool:
        """Whether a model may count in such a value."""
        if isinstance(value, Tensor):
            return value.numel() == 1 and not value.is_floating_point() and not value.is_complex()
        return isinstance(value, (*PLAIN, itertools.count))

    def differs(self, now: Any) -> bool:
        """Whether it is another number by ``now``. Reads the device where a tensor was written."""
        if isinstance(self._value, itertools.count):
            return repr(now) != self._next
        if not isinstance(self._value, Tensor):
            return isinstance(now, PLAIN) and now is not self._value and bool(now != self._value)
        if now is self._value and self._version == version_of(now) != NO_VERSION:
            return False
        return isinstance(now, Tensor) and now.shape == self._number.shape and bool((now != self._number).any())

    def restored(self) -> Any:
        """The value as it was."""
        if isinstance(self._value, itertools.count):
            return _counting(self._next)
        if isinstance(self._value, Tensor):
            with torch.inference_mode(self._value.is_inference()), torch.no_grad():
                self._value.copy_(self._number)
        return self._value


def version_of(tensor: Tensor) -> int:
    """Times that it was written in place; ``NO_VERSION`` for those of inference mode, which do not count."""
    return NO_VERSION if tensor.is_inference() else tensor._version


def _counting(text: str) -> itertools.count[Any]:
    """``itertools.count`` from its text."""
    numbers = ast.literal_eval(text.removeprefix("count"))
    return itertools.count(*numbers) if isinstance(numbers, tuple) else itertools.count(numbers)


def put(keeper: Any, name: Any, value: Any) -> None:
    """Set an attribute, or an item of a mapping or list."""
    if isinstance(keeper, MutableMapping | list):
        keeper[name] = value
    else:
        setattr(keeper, name, value)


def _counts_of(keeper: Any) -> dict[Any, Count]:
    return {name: Count(value) for name, value in items_of(keeper).items() if Count.can_be(value)}
