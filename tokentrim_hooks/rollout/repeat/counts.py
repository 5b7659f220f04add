"""One thing that a model may count its calls in, to be compared later and put back."""

from __future__ import annotations

import array
import ast
import copy
import itertools
import numbers
from abc import abstractmethod
from collections import deque
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks.pruning.autograd_modes import writing
from tokentrim_hooks.rollout.repeat.dice import is_dice, set_state, state_of
from tokentrim_hooks.rollout.repeat.iterators import copied, is_iterator, place_of
from tokentrim_hooks.rollout.repeat.keepers import put

PLAIN = (numbers.Number, str, bytes, type(None))
NO_VERSION = -1
FEW = 64
"""Numbers of a tensor in which a model may count, one for each layer, branch or sample."""
SMALL = 4096
"""Bytes of an array of numpy that are compared."""
LONG = 256
"""Entries of a container that are compared one by one; of a longer one, how many there are."""


class Count:
    """Something that a model keeps, as it was.

    Attributes:
        restorable: whether it can be put back. over: whether it will not change any more.
    """

    restorable, over = True, False

    def __init__(self, value: Any) -> None:
        self._value = value

    @abstractmethod
    def differs(self, now: Any) -> bool:
        """Whether ``now``, which the model keeps by the same name, is something else."""

    @property
    def counts_if_new(self) -> bool:
        """Whether it counts something where there was nothing before."""
        return True

    def has_grown(self, now: Any) -> bool:
        """Whether there is more in it, and all that was."""
        return False

    def switches(self, now: Any) -> bool:
        """Whether it is no number that is counted on, but a setting that has become ``now``."""
        return False

    def restore(self, keeper: Any, name: Any) -> None:
        """Put it back as it was."""
        put(keeper, name, self._value)


class Plain(Count):
    """A number, a text, or a tuple of them."""

    def differs(self, now: Any) -> bool:
        """By value."""
        return now is not self._value and is_plain(now) and bool(now != self._value)

    def switches(self, now: Any) -> bool:
        """Whether it is a setting."""
        return is_setting(self._value) and is_setting(now)


class Few(Count):
    """A tensor of a few numbers. Reads the device where it was written."""

    def __init__(self, value: Tensor) -> None:
        super().__init__(value)
        self._number, self._version = value.detach().clone(), version_of(value)

    def differs(self, now: Any) -> bool:
        """By value, unless its version says that nobody has written."""
        if now is self._value and self._version == version_of(now) != NO_VERSION:
            return False
        return isinstance(now, Tensor) and now.shape == self._number.shape and bool((now != self._number).any())

    def restore(self, keeper: Any, name: Any) -> None:
        """In its own memory."""
        writing(self._value, self._value.copy_, self._number)
        super().restore(keeper, name)


class Array(Count):
    """A small array, of numpy or Python's own."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self._copy = copy.copy(value)

    def differs(self, now: Any) -> bool:
        """By its bytes."""
        return is_array(now) and now.tobytes() != self._copy.tobytes()

    def restore(self, keeper: Any, name: Any) -> None:
        """In its own memory."""
        self._value[slice(None) if isinstance(self._value, array.array) else ...] = self._copy
        super().restore(keeper, name)


class Entries(Count):
    """A list, deque, set or dict: how much is in it, and the numbers and texts among that."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self._size, short = len(value), len(value) <= LONG
        self._copy = value.copy() if short else None
        self._plain = _plain_of(value) if short else None
        self.restorable, self.over = short or isinstance(value, list | deque), True

    def differs(self, now: Any) -> bool:
        """By size, and by what can be compared in it."""
        if not is_container(now):
            return False
        return len(now) != self._size or (self._plain is not None and _plain_of(now) != self._plain)

    @property
    def counts_if_new(self) -> bool:
        """Where numbers or texts are in it: a cache that is handed on so (MemRoPE) is set anew by the next call."""
        return any(is_plain(part) for part in (self._value.values() if isinstance(self._value, dict) else self._value))

    def has_grown(self, now: Any) -> bool:
        """By its beginning; one that lets go of what is oldest has always grown."""
        if now is not self._value or isinstance(now, MutableMapping):
            return False
        if isinstance(now, deque) and now.maxlen is not None:
            return True
        longer = len(now) > self._size
        if isinstance(now, set) or self._copy is None:
            return longer and (self._copy is None or self._copy <= now)
        return longer and all(map(_is, self._copy, now))

    def restore(self, keeper: Any, name: Any) -> None:
        """In its own memory, for others may hold it."""
        value = self._value
        if self._copy is not None:
            value.clear()
            (value.extend if isinstance(value, list | deque | bytearray) else value.update)(self._copy)
        while len(value) > self._size and isinstance(value, list | deque):
            value.pop()
        super().restore(keeper, name)


class Place(Count):
    """How far an iterator has come."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self._place, self._copy = place_of(value), copied(value)
        self.restorable = self._copy is not None or isinstance(value, itertools.count)
        self.over = isinstance(value, itertools.repeat) or self._place is None

    def differs(self, now: Any) -> bool:
        """By its place, or by what it iterates over."""
        return is_iterator(now) and place_of(now) != self._place

    def restore(self, keeper: Any, name: Any) -> None:
        """By another one, that stands where it stood."""
        if self.restorable:
            counts = isinstance(self._value, itertools.count)
            put(keeper, name, _counting(str(self._place)) if counts else copied(self._copy))


class Dice(Count):
    """The state of what draws random numbers."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self._state = state_of(value)

    def differs(self, now: Any) -> bool:
        """By the state; numpy's has arrays in it."""
        return is_dice(now) and repr(state_of(now)) != repr(self._state)

    def restore(self, keeper: Any, name: Any) -> None:
        """In place."""
        set_state(self._value, self._state)
        super().restore(keeper, name)


def count_of(value: Any) -> Count | None:
    """What ``value`` is, if a model may count in it."""
    if is_plain(value):
        return Plain(value)
    if isinstance(value, Tensor):
        return Few(value) if _is_few(value) else None
    kinds = ((is_container, Entries), (is_array, Array), (is_dice, Dice), (is_iterator, Place))
    return next((kind(value) for fits, kind in kinds if fits(value)), None)


def is_plain(value: Any) -> bool:
    """Whether it is a number, a text, or a short tuple of such."""
    if isinstance(value, tuple):
        return len(value) <= FEW and all(isinstance(part, PLAIN) for part in value)
    return isinstance(value, PLAIN)


def is_setting(value: Any) -> bool:
    """Whether it is no number: what is on or off, a name, or nothing."""
    return isinstance(value, bool | str | None)


def is_container(value: Any) -> bool:
    """Whether it is one of Python's containers, which count by their size."""
    return isinstance(value, list | deque | set | dict | bytearray)


def is_array(value: Any) -> bool:
    """Whether it is a small array, of Python's or of numpy, which need not be installed."""
    if isinstance(value, array.array):
        return value.itemsize * len(value) <= SMALL
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes") and value.nbytes <= SMALL


def version_of(tensor: Tensor) -> int:
    """Times that it was written in place; ``NO_VERSION`` for those of inference mode, which do not count."""
    return NO_VERSION if tensor.is_inference() else tensor._version


def _is_few(value: Tensor) -> bool:
    """Whether numbers are few enough. One that is no integer is a count too, but may be a scale: read if written."""
    if value.is_complex() or isinstance(value, nn.Parameter) or value.numel() > FEW:
        return False
    return not value.is_floating_point() or (value.numel() == 1 and not value.is_inference())


def _plain_of(value: Any) -> Any:
    """The numbers and texts in a container, with their places."""
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if is_plain(part)}
    if isinstance(value, set):
        return {part for part in value if is_plain(part)}
    return [part if is_plain(part) else None for part in value]


def _is(one: Any, other: Any) -> bool:
    return one is other


def _counting(text: str) -> itertools.count[Any]:
    """``itertools.count`` from its text."""
    parts = ast.literal_eval(text.removeprefix("count"))
    return itertools.count(*parts) if isinstance(parts, tuple) else itertools.count(parts)
