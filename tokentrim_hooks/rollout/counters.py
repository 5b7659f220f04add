"""Where a model counts its calls: plain values in attributes of its modules, or behind a forward that was replaced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

PLAIN = (int, float, str)
DEPTH = 4
"""Functions that a replaced forward may be wrapped in."""


class Counters:
    """What a module and its parts keep in plain values now, to be compared later and put back."""

    def __init__(self, module: object) -> None:
        self._kept = [(keeper, dict(_values(keeper))) for keeper in _keepers(module)]

    def put_back(self) -> list[str]:
        """Put back what has changed since; returns the names of it."""
        changed = []
        for keeper, before in self._kept:
            now = dict(_values(keeper))
            for name in [name for name, value in before.items() if name in now and now[name] != value]:
                if isinstance(keeper, dict):
                    keeper[name] = before[name]
                else:
                    setattr(keeper, name, before[name])
                changed.append(f"{type(keeper).__name__}.{name}")
        return sorted(set(changed))


def _values(keeper: Any) -> Iterator[tuple[str, Any]]:
    """Plain values of a module or object, of a dict, or of a variable of an enclosing function (a cell)."""
    if isinstance(keeper, dict):
        items = list(keeper.items())
    elif hasattr(keeper, "cell_contents"):
        items = [("cell_contents", keeper.cell_contents)]
    else:
        items = list(vars(keeper).items())
    return ((name, value) for name, value in items if isinstance(value, PLAIN))


def _keepers(module: object) -> Iterator[Any]:
    for part in module.modules() if isinstance(module, nn.Module) else ():
        yield part
        forward = vars(part).get("forward")
        if forward is not None:
            yield from _behind(forward, DEPTH)


def _behind(function: Any, depth: int) -> Iterator[Any]:
    """What a function that stands in for a forward can count in: its closure, its object, and theirs."""
    if not depth:
        return
    inner: list[Any] = [function.func] if isinstance(function, functools.partial) else []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a variable that was not set yet
            continue
        yield cell
        inner.append(content)
    inner += [function.__self__] if inspect.ismethod(function) else []
    for content in inner:
        if isinstance(content, dict) or (hasattr(content, "__dict__") and not _is_code(content)):
            yield content
        elif callable(content) and not isinstance(content, type):
            yield from _behind(content, depth - 1)


def _is_code(content: Any) -> bool:
    """Whether it is a function, class or module of Python, or a part of the model, which is looked at anyway."""
    return isinstance(content, nn.Module | type) or inspect.isroutine(content) or inspect.ismodule(content)
