"""A comparable snapshot of a model, to prove that a patch left nothing behind.

It covers what a patch could touch: instance attributes (hooks among them) of all modules, of the pipeline around
them and of plain objects that these hold; the dicts of their classes; functions and classes in the modules that
define them; where parameters and buffers lie and whether they were written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

REGISTRIES = frozenset(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name.startswith("_")
)
"""Dicts that torch keeps in every module: parameters, buffers, submodules and all kinds of hooks."""

VOLATILE_IN_CLASSES = frozenset(
    {
        "__dict__", "__weakref__", "__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__",
        "__slotnames__", "_abc_impl", "__abstractmethods__",
    }
)  # fmt: skip
"""Entries that Python itself makes on first use, for example when an object is copied."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CODE = (FunctionType, MethodType, BuiltinFunctionType, partial, type)


@dataclass(frozen=True, eq=False)
class Identity:
    """Equal only to an identity of the very same object; keeps the object alive, so that ids are never reused."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        name = getattr(self.value, "__qualname__", None)
        label = f" {name}" if isinstance(name, str) else ""
        return f"<{type(self.value).__module__}.{type(self.value).__qualname__}{label} at {id(self.value):#x}>"


@dataclass(frozen=True)
class Fingerprint:
    """Snapshot: ``entries[place] = what was there``. Equal when all entries are equal."""

    entries: dict[str, Any] = field(default_factory=dict)

    def changed(self, after: Fingerprint) -> set[str]:
        """Places that differ between this snapshot and a later one."""
        keys = self.entries.keys() | after.entries.keys()
        return {key for key in keys if self.entries.get(key, _ABSENT) != after.entries.get(key, _ABSENT)}

    def differences(self, after: Fingerprint, ignore: Set[str] = frozenset()) -> list[str]:
        """One readable line for every place that differs; functions and hooks are never ignored."""
        lines = []
        for key in sorted(self.changed(after)):
            old, new = self.entries.get(key, _ABSENT), after.entries.get(key, _ABSENT)
            if key not in ignore or ((_is_code(old) or _is_code(new)) and not _made_anew(old, new)):
                lines.append(_line(key, old, new))
        return lines


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def fingerprint(model: Any) -> Fingerprint:
    """Take the snapshot of a pipeline or module; runs no code of the model."""
    entries: dict[str, Any] = {}
    kinds: dict[type, None] = {}
    for path, owner in _owners(model):
        entries.update(_attributes(path, owner))
        kinds.update(dict.fromkeys(type(owner).__mro__))
    for kind in kinds:
        if kind is not object:
            entries.update(_class_entries(kind))
    for module in _namespaces(list(kinds)):
        entries.update(_module_entries(module))
    return Fingerprint(entries)


def assert_same(before: Fingerprint, after: Fingerprint, ignore: Set[str] = frozenset(), limit: int = 20) -> None:
    """Raise AssertionError with a readable diff unless the snapshots are equal.

    ``ignore`` names places that the model itself changes when it runs (``before.changed(after)`` of an unpatched run).
    """
    lines = before.differences(after, ignore)
    if lines:
        more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
        raise AssertionError("\n".join(["the model is not as it was:", *lines[:limit], *more]))


def _line(key: str, old: Any, new: Any) -> str:
    if old is _ABSENT:
        return f"  added   {key} = {new!r}"
    if new is _ABSENT:
        return f"  removed {key} (was {old!r})"
    return f"  changed {key}: {old!r} -> {new!r}"


def _is_code(entry: Any) -> bool:
    return isinstance(entry, Identity) and callable(entry.value) and not isinstance(entry.value, nn.Module)


def _made_anew(old: Any, new: Any) -> bool:
    """Data that can be called, as numpy's poly1d, which a model makes again for each run; no wrapper is of its type."""
    if not (isinstance(old, Identity) and isinstance(new, Identity)):
        return False
    return type(old.value) is type(new.value) and not isinstance(old.value, CODE)


# ------------------------------------------------------------------------------------------- what to look at


def _owners(model: Any) -> Iterator[tuple[str, Any]]:
    """The model, all modules in it, and the plain objects that these hold, each once."""
    seen: set[int] = set()
    queue: list[tuple[str, Any]] = [(type(model).__name__, model)]
    while queue:
        path, owner = queue.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        yield path, owner
        queue.extend(_children(path, owner, plain=isinstance(owner, nn.Module) or owner is model))


def _children(path: str, owner: Any, plain: bool) -> Iterator[tuple[str, Any]]:
    """Modules below ``owner``; with ``plain`` also other objects with attributes, for example a scheduler."""
    held = dict(vars(owner))
    held.update(held.get("_modules") or {})
    for name, value in held.items():
        if isinstance(value, nn.Module) or (plain and _has_attributes(value)):
            yield f"{path}.{name}", value
        elif plain and isinstance(value, (list, tuple)):
            yield from ((f"{path}.{name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, nn.Module))


def _has_attributes(value: Any) -> bool:
    if isinstance(value, (type, ModuleType, FunctionType, MethodType, Tensor)):
        return False
    if type(value).__module__ == "tokentrim_hooks.handle.handle":  # a patch that is still on is one line
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _namespaces(kinds: list[type]) -> list[ModuleType]:
    """Modules that define the classes, those that define the functions these use, and torch.nn.functional."""
    found: dict[str, ModuleType] = {"torch.nn.functional": torch.nn.functional}
    for kind in kinds:
        home = sys.modules.get(kind.__module__)
        if home is None or _foreign(kind.__module__):
            continue
        found[kind.__module__] = home
        for value in list(vars(home).values()):
            name = getattr(value, "__module__", None)
            if isinstance(value, FunctionType) and name in sys.modules and not _foreign(name):
                found[name] = sys.modules[name]
    return list(found.values())


def _foreign(module: str) -> bool:
    return module.split(".")[0] in {"torch", "builtins", "typing", "abc", "collections", "tokentrim_hooks_adapters"}


# ------------------------------------------------------------------------------------------- what is there


def _attributes(path: str, owner: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(owner).items():
        if isinstance(owner, nn.Module) and name in REGISTRIES and isinstance(value, dict):
            yield from ((f"{path}.{name}[{key!r}]", _entry(item)) for key, item in value.items())
        else:
            yield f"{path}.{name}", _entry(value)


def _class_entries(kind: type) -> Iterator[tuple[str, Any]]:
    place = f"class {kind.__module__}.{kind.__qualname__}"
    for name, value in vars(kind).items():
        if name not in VOLATILE_IN_CLASSES:
            yield f"{place}.{name}", _entry(value)


def _module_entries(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if callable(value):
            yield f"module {module.__name__}.{name}", Identity(value)


def _entry(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _storage(value)
    if isinstance(value, PLAIN):
        return (type(value).__name__, repr(value))
    return Identity(value)


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how often it was written."""
    place = tensor.data_ptr() if tensor.device.type != "meta" else 0
    version = 0 if tensor.is_inference() else tensor._version
    return Identity(tensor), place, tuple(tensor.shape), str(tensor.dtype), str(tensor.device), version
