"""What a function that stands in for a forward can count in: its variables, its object, and those of its helpers."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, MutableMapping
from random import Random
from types import CodeType, FunctionType
from typing import Any

from torch import Generator, Tensor

DEPTH = 4
"""Functions that a replaced forward may be wrapped in, or call."""
PLAIN_HOMES = ("builtins", "types", "collections", "itertools", "functools", "random", "_thread")
"""Modules of Python whose objects somebody takes for a counter."""


class Variables(MutableMapping[str, Any]):
    """What a function finds outside of itself, by name: variables that enclose it, and globals that it counts in."""

    def __init__(self, function: FunctionType) -> None:
        self.__name__, self._globals = function.__name__, function.__globals__
        code = function.__code__
        self._cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        changed = {name for name in code.co_names if _changes_in_place(self._globals.get(name))}
        self._names = (*self._cells, *sorted(changed.union(_written(code)) - self._cells.keys()))

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents if name in self._cells else self._globals[name]
        except ValueError:  # a variable that was not set yet
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._cells:
            self._cells[name].cell_contents = value
        else:
            self._globals[name] = value

    def __delitem__(self, name: str) -> None:
        if name in self._cells:
            del self._cells[name].cell_contents
        else:
            del self._globals[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def outside_of(function: Any, depth: int = DEPTH, seen: set[int] | None = None) -> Iterator[Any]:
    """All that ``function`` can keep something in, and what is in that; that of its helpers, too.

    Left out is what has been ``seen``, which lives meanwhile.
    """
    seen = set() if seen is None else seen
    if not depth or (isinstance(function, FunctionType) and id(function) in seen):
        return
    seen.add(id(function))
    for content in _around(function):
        yield content
        if callable(content) and not isinstance(content, type):
            yield from outside_of(content, depth - 1, seen)


def _around(function: Any) -> list[Any]:
    if isinstance(function, functools.partial):
        given = {**{f"argument {place}": part for place, part in enumerate(function.args)}, **function.keywords}
        return [function.func, given, *given.values()]
    if inspect.ismethod(function):
        return [function.__self__, function.__func__]
    if not isinstance(function, FunctionType):
        return []
    variables = Variables(function)
    defaults = _defaults_of(function)
    # The function itself has attributes.
    found = [function, *variables.values(), *defaults.values(), *_named(function)]
    return found + [names for names in (variables, defaults) if names]


def _defaults_of(function: FunctionType) -> dict[str, Any]:
    """What parameters are when they are left out, by name: the same list each time."""
    code, defaults = function.__code__, function.__defaults__ or ()
    named = zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True)
    return {**dict(named), **(function.__kwdefaults__ or {})}


def _named(function: FunctionType) -> Iterator[Any]:
    """Globals that the function names: what is of its own module, and plain objects."""
    home = function.__globals__.get("__name__")
    for name in function.__code__.co_names:
        content = function.__globals__.get(name)
        kind = content if isinstance(content, type | FunctionType) else type(content)
        plain = kind is not content and kind.__module__ in PLAIN_HOMES and not inspect.ismodule(content)
        if plain or kind.__module__ == home:
            yield content


def _changes_in_place(content: Any) -> bool:
    """Whether a global counts without being assigned to."""
    kind = type(content)
    if isinstance(content, Tensor | list | set | bytearray | Random | Generator):
        return True
    return kind.__module__ in ("collections", "itertools") or kind.__module__.startswith("numpy") or _iterates(content)


def _iterates(content: Any) -> bool:
    return isinstance(content, Iterator) and type(content).__module__ == "builtins"


@functools.lru_cache(maxsize=4096)
def _written(code: CodeType) -> frozenset[str]:
    """Globals that a function's code writes."""
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname == "STORE_GLOBAL")
