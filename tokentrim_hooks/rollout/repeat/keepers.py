"""Where a model can keep something from one call to the next: its modules and classes, what hangs on them, closures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

PLAIN = (int, float, str)
DEPTH = 4
"""Functions that a replaced forward may be wrapped in."""
NO_MEMORY = (frozenset(vars(nn.Module())) - {"_buffers"}) | {"_hf_hook"}
"""Attributes that every module has (parameters and parts, which are looked at by themselves), hooks, accelerate's too.

A hook may count what it likes: whatever it changes in the output, the replay with nothing pruned shows.
"""


def items_of(keeper: Any) -> dict[Any, Any]:
    """What a module, class, object, dict or list keeps, or a variable of an enclosing function (a cell), by name."""
    if isinstance(keeper, dict):
        return dict(keeper)
    if isinstance(keeper, list):
        return dict(enumerate(keeper))
    if hasattr(keeper, "cell_contents"):
        return {"cell_contents": keeper.cell_contents}
    return {name: value for name, value in vars(keeper).items() if name not in NO_MEMORY}


def keepers_of(module: object) -> Iterator[Any]:
    """Modules, their classes, objects and dicts that are attributes of them, and what a replaced forward can use."""
    for part in module.modules() if isinstance(module, nn.Module) else ():
        yield part
        yield from (value for value in items_of(part).values() if keeps(value) and not isinstance(value, list))
        forward = vars(part).get("forward")
        if forward is not None:
            yield from _behind(forward, DEPTH)
    yield from _classes_of(module)


def keeps(content: Any) -> bool:
    """Whether it can keep something: a dict, a list, or an object of somebody else's that has attributes."""
    if isinstance(content, dict | list):
        return True
    return hasattr(content, "__dict__") and not _is_code(content) and not _is_ours(content)


def _classes_of(module: object) -> Iterator[type]:
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    yield from (kind for kind in {type(part) for part in parts} if not kind.__module__.startswith("torch."))


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
        if keeps(content) and not isinstance(content, list):
            yield content
        elif callable(content) and not isinstance(content, type):
            yield from _behind(content, depth - 1)


def _is_code(content: Any) -> bool:
    """Whether it is a function, class or module of Python, a tensor, or a part of the model (looked at anyway)."""
    return isinstance(content, nn.Module | Tensor | type) or inspect.isroutine(content) or inspect.ismodule(content)


def _is_ours(content: Any) -> bool:
    return type(content).__module__.startswith("tokentrim_hooks")
