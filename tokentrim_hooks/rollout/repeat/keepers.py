"""Where a model can keep something from one call to the next: its modules and classes, what hangs on them, closures."""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
from collections.abc import Hashable, Iterable, Iterator, MutableMapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks.rollout.repeat.functions import PLAIN_HOMES, is_of_library, methods_named, names_in, outside_of
from tokentrim_hooks.rollout.repeat.hooks import hooks_of

NO_MEMORY = (frozenset(vars(nn.Module())) - {"_buffers"}) | {"_hf_hook"}
"""Attributes that every module has: parameters and parts, which are looked at by themselves, as hooks are."""


def items_of(keeper: Any) -> dict[Any, Any]:
    """What a module, class, function, object, mapping or list keeps, by name."""
    if isinstance(keeper, MutableMapping):
        return dict(keeper)
    if isinstance(keeper, list):
        return dict(enumerate(keeper))
    own = vars(keeper).items() if hasattr(keeper, "__dict__") else ()
    slots = {name: getattr(keeper, name) for name in _slots(keeper) if hasattr(keeper, name)}
    kind: Any = type(keeper)
    known = _declared(kind) if str(kind.__module__).startswith("torch.nn.modules") else NO_MEMORY
    return {**slots, **{name: value for name, value in own if name not in known}}


def keepers_of(module: object) -> Iterator[Any]:
    """Modules, their classes, objects and dicts that are attributes of them, and what a replaced forward can use."""
    for part in module.modules() if isinstance(module, nn.Module) else ():
        yield part
        yield from (value for value in items_of(part).values() if keeps(value) and not isinstance(value, list))
    seen: set[int] = set()
    for function in functions_of(module):
        yield from filter(_counts, outside_of(function, seen=seen))
    yield from _classes_of(module)
    yield ContextVariables()


def functions_of(module: object) -> Iterator[Any]:
    """What runs in a call: forwards that were replaced, those of the parts' classes, what they call, and hooks."""
    yield from hooks_of(module)
    kinds: dict[type, None] = {type(module): None}
    for part in module.modules() if isinstance(module, nn.Module) else ():
        if "forward" in vars(part):
            yield vars(part)["forward"]
        kinds[type(part)] = None
        kinds |= {type(value): None for value in items_of(part).values() if callable(value) and keeps(value)}
    for kind in kinds:
        yield from _methods_of(kind)


@functools.lru_cache(maxsize=1024)
def _methods_of(kind: type) -> tuple[FunctionType, ...]:
    """What a class runs in a call: its forward, and methods that this names, and so on."""
    found: dict[FunctionType, None] = {}
    level: Any = () if is_of_library(kind.__module__) else methods_named(kind, ("forward", "__call__"))
    while level := [method for method in level if method not in found]:
        found |= dict.fromkeys(level)
        level = [method for known in level for method in methods_named(kind, names_in(known))]
    return tuple(found)


class ContextVariables(MutableMapping[str, Any]):
    """The variables of the running task or thread (:mod:`contextvars`), by name; none of them can be unset."""

    def __init__(self) -> None:
        self.__name__ = "context variable"
        self._variables = {f"{variable.name}": variable for variable in contextvars.copy_context()}

    def __getitem__(self, name: str) -> Any:
        return self._variables[name].get()

    def __setitem__(self, name: str, value: Any) -> None:
        self._variables[name].set(value)

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def key(self, name: str) -> Hashable:
        """The same each time that they are looked at."""
        return id(self._variables[name])


def reachable(roots: Iterable[Any], depth: int) -> list[tuple[Any, str]]:
    """The roots and what they keep that can itself keep something, each once, with a name for it."""
    found: dict[int, tuple[Any, str]] = {}
    level = [(root, "") for root in roots]
    for _ in range(depth):
        level = [(thing, path) for thing, path in level if id(thing) not in found]
        found |= {id(thing): (thing, _label(thing, path)) for thing, path in level}
        level = [
            (part, f"{_label(thing, path)}.{name}")
            for thing, path in level
            if not isinstance(thing, type)
            for name, value in items_of(thing).items()
            for part in containers((value,))
        ]
    return list(found.values())


def containers(things: Iterable[Any]) -> Iterator[Any]:
    """Dicts, lists and objects among the things; in tuples, too."""
    for thing in things:
        if isinstance(thing, tuple):
            yield from containers(thing)
        elif keeps(thing):
            yield thing


def put(keeper: Any, name: Any, value: Any) -> None:
    """Set an attribute, or an item of a mapping or list."""
    if isinstance(keeper, MutableMapping | list):
        keeper[name] = value
    else:
        setattr(keeper, name, value)


def take_out(keeper: Any, name: Any) -> None:
    """Delete an attribute, or an item of a mapping."""
    if isinstance(keeper, MutableMapping):
        del keeper[name]
    else:
        delattr(keeper, name)


def keeps(content: Any) -> bool:
    """Whether it can keep something: a mapping, a list, or an object of somebody else's that has attributes."""
    if content is None or isinstance(content, bool | int | float | str | Tensor):
        return False
    if isinstance(content, MutableMapping | list):
        return True
    if _is_code(content) or is_ours(content) or _is_nobodys_memory(content):
        return False
    return hasattr(content, "__dict__") or bool(_slots(content))


def _counts(content: Any) -> bool:
    """Whether a function may count in it: not in lists, for those are more often logs."""
    if isinstance(content, FunctionType | type):
        return not content.__module__.startswith("torch.") and not is_ours(content)
    return keeps(content) and not isinstance(content, list)


@functools.cache
def _declared(kind: Any) -> frozenset[str]:
    """Attributes that a layer of torch's has as such: its sizes and settings, of which there are thousands."""
    known = [(getattr(base, "__constants__", ()), vars(base).get("__annotations__", ())) for base in kind.__mro__]
    return NO_MEMORY.union(*(names for pair in known for names in pair))


def _slots(content: Any) -> tuple[str, ...]:
    """Attributes that a class declares instead of a dict; names only, of classes that are written in Python."""
    kind: Any = type(content)
    return () if isinstance(content, tuple | type | Tensor) else _slots_of(kind)


@functools.lru_cache(maxsize=4096)
def _slots_of(of: Any) -> tuple[str, ...]:
    declared = (vars(kind).get("__slots__", ()) for kind in of.__mro__)
    names = (name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots))
    return tuple(name for name in names if not name.startswith("__"))


def _classes_of(module: object) -> Iterator[type]:
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    yield from (kind for kind in {type(part) for part in parts} if not kind.__module__.startswith("torch."))


def _is_code(content: Any) -> bool:
    """Whether it is a function, class or module of Python, a tensor, or a part of the model (looked at anyway)."""
    return isinstance(content, nn.Module | Tensor | type) or inspect.isroutine(content) or inspect.ismodule(content)


def _label(thing: Any, path: str) -> str:
    """What a keeper is called: by its own name or its class, and where these say nothing by where it was found."""
    if hasattr(thing, "__name__"):
        return str(thing.__name__)
    return path if path and type(thing).__module__ in ("builtins", "collections") else type(thing).__name__


def _is_nobodys_memory(content: Any) -> bool:
    """Whether it is an object of Python's library (a logger, a lock, a thread), or of torch's collectives.

    FSDP2 counts the order of its groups in each call, repeated ones too.
    """
    home = type(content).__module__
    if home.startswith("torch.distributed."):
        return True
    library = home.partition(".")[0]
    return library in sys.stdlib_module_names and library not in PLAIN_HOMES


def is_ours(content: Any) -> bool:
    """Whether it is one of this package's own."""
    kind = content if isinstance(content, FunctionType | type) else type(content)
    return kind.__module__.startswith("tokentrim_hooks")
