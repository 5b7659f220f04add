"""Where a model can keep something from one call to the next: its modules and classes, what hangs on them, closures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, MutableMapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks.rollout.repeat.functions import outside_of

NO_MEMORY = (frozenset(vars(nn.Module())) - {"_buffers"}) | {"_hf_hook"}
"""Attributes that every module has (parameters and parts, which are looked at by themselves), hooks, accelerate's too.

A hook may count what it likes: whatever it changes in the output, the replay with nothing pruned shows.
"""


def items_of(keeper: Any) -> dict[Any, Any]:
    """What a module, class, function, object, mapping or list keeps, by name."""
    if isinstance(keeper, MutableMapping):
        return dict(keeper)
    if isinstance(keeper, list):
        return dict(enumerate(keeper))
    own = vars(keeper).items() if hasattr(keeper, "__dict__") else ()
    slots = {name: getattr(keeper, name) for name in _slots(keeper) if hasattr(keeper, name)}
    return {**slots, **{name: value for name, value in own if name not in NO_MEMORY}}


def keepers_of(module: object) -> Iterator[Any]:
    """Modules, their classes, objects and dicts that are attributes of them, and what a replaced forward can use."""
    for part in module.modules() if isinstance(module, nn.Module) else ():
        yield part
        yield from (value for value in items_of(part).values() if keeps(value) and not isinstance(value, list))
        forward = vars(part).get("forward")
        if forward is not None:
            yield from filter(_counts, outside_of(forward))
    yield from filter(_counts, outside_of(getattr(type(module), "forward", None)))
    yield from _classes_of(module)


def keeps(content: Any) -> bool:
    """Whether it can keep something: a mapping, a list, or an object of somebody else's that has attributes."""
    if isinstance(content, MutableMapping | list):
        return True
    return (hasattr(content, "__dict__") or bool(_slots(content))) and not _is_code(content) and not _is_ours(content)


def _counts(content: Any) -> bool:
    """Whether a function may count in it: not in lists, for those are more often logs."""
    if isinstance(content, FunctionType | type):
        return not content.__module__.startswith("torch.") and not _is_ours(content)
    return keeps(content) and not isinstance(content, list)


def _slots(content: Any) -> tuple[str, ...]:
    """Attributes that a class declares instead of a dict; names only, of classes that are written in Python."""
    if isinstance(content, tuple | type | Tensor):
        return ()
    declared = (vars(kind).get("__slots__", ()) for kind in type(content).__mro__)
    names = (name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots))
    return tuple(name for name in names if not name.startswith("__"))


def _classes_of(module: object) -> Iterator[type]:
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    yield from (kind for kind in {type(part) for part in parts} if not kind.__module__.startswith("torch."))


def _is_code(content: Any) -> bool:
    """Whether it is a function, class or module of Python, a tensor, or a part of the model (looked at anyway)."""
    return isinstance(content, nn.Module | Tensor | type) or inspect.isroutine(content) or inspect.ismodule(content)


def _is_ours(content: Any) -> bool:
    kind = content if isinstance(content, FunctionType | type) else type(content)
    return kind.__module__.startswith("tokentrim_hooks")
