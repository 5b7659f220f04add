"""How far an iterator has come, read without moving it."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import types
import warnings
from collections.abc import Iterator, Sized
from typing import Any

DEPTH = 4
"""Iterators within one another, as in ``zip(count(), repeat(0))``."""
PLAIN = (int, float, complex, str, bytes, type(None))
_EMPTY: tuple[Any, ...] = ([], (), "", b"", range(0), range(2**70), reversed([]))
WITH_COPIES = tuple(type(iter(empty)) for empty in _EMPTY)
"""Iterators of Python that a copy of goes on by itself."""


def is_iterator(value: Any) -> bool:
    """Whether it is one of Python's own; those of somebody's class keep their place in attributes."""
    return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")


def place_of(iterator: Any, depth: int = DEPTH) -> object:
    """Something that is equal as long as the iterator has not moved."""
    if isinstance(iterator, itertools.count | itertools.repeat):
        return repr(iterator)
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        # What is on its stack, as the iterator of a loop, is no variable of it.
        return None if frame is None else (frame.f_lasti, *_parts(gc.get_referents(iterator), depth))
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")  # itertools lose it in Python 3.14
        return tuple(_parts(iterator.__reduce__(), depth))
    return tuple(_parts(gc.get_referents(iterator), depth))


def copied(iterator: Any) -> Any:
    """A copy that stands where it stands; None where there is none."""
    return copy.copy(iterator) if isinstance(iterator, WITH_COPIES) else None


def _parts(things: Any, depth: int) -> Iterator[object]:
    for thing in things:
        if isinstance(thing, PLAIN):
            yield thing
        elif is_iterator(thing) and depth:
            yield place_of(thing, depth - 1)
        elif isinstance(thing, tuple) and depth:
            yield tuple(_parts(thing, depth - 1))
        elif isinstance(thing, list | dict | set) and isinstance(thing, Sized):
            yield len(thing)
