"""What a function that stands in for a forward can count in: its variables, its object, and those of its helpers."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from random import Random
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Generator, Tensor

DEPTH = 4
"""Functions that a replaced forward may be wrapped in, or call."""
ADDS = frozenset(("append", "appendleft", "add", "extend", "extendleft", "insert", "update"))
"""Methods that put something into a container."""
PLAIN_HOMES = (
    *("builtins", "types", "collections", "itertools", "functools", "random", "array", "queue"),
    *("_thread", "_collections", "_functools", "_random"),
)
"""Modules of Python whose objects somebody takes for a counter."""
LIBRARIES = frozenset(("torch", "numpy", "tokentrim_hooks", "tokentrim_hooks_adapters")) | sys.stdlib_module_names
"""Packages whose functions count nothing of a model's."""


class Variables(MutableMapping[str, Any]):
    """What a function finds outside of itself, by name.

    Variables that enclose it, and globals that it counts in: of its own module, and of others that it names.

    Attributes:
        modules: these others, by how it names them.
    """

    def __init__(self, function: FunctionType) -> None:
        self.__name__, code, own = function.__name__, function.__code__, function.__globals__
        self._cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._globals = {name: (own, name) for name in _counted(own, code, "STORE_GLOBAL") if name not in self._cells}
        self.modules = _modules_in(function)
        for label, module in self.modules.items():
            names = _counted(vars(module), code, "STORE_ATTR")
            self._globals |= {f"{label}.{name}": (vars(module), name) for name in names if name in vars(module)}
        self._names = (*self._cells, *self._globals)

    def __getitem__(self, name: str) -> Any:
        if name not in self._cells:
            place, key = self._globals[name]
            return place[key]
        try:
            return self._cells[name].cell_contents
        except ValueError:  # a variable that was not set yet
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._cells:
            self._cells[name].cell_contents = value
        else:
            place, key = self._globals[name]
            place[key] = value

    def __delitem__(self, name: str) -> None:
        if name in self._cells:
            del self._cells[name].cell_contents
        else:
            place, key = self._globals[name]
            del place[key]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def key(self, name: str) -> Hashable:
        """The same for every function that shares the variable."""
        if name in self._cells:
            return id(self._cells[name])
        place, key = self._globals[name]
        return id(place), key


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
        given = _given_to(function)
        return [function.func, given, *given.values()]
    if inspect.ismethod(function):
        return [function.__self__, function.__func__, *_methods_of([function.__self__], names_in(function))]
    if not isinstance(function, FunctionType):
        return []
    variables = Variables(function)
    defaults = _defaults_of(function)
    values = [kept() if isinstance(kept, weakref.ref) else kept for kept in (*variables.values(), *defaults.values())]
    named = list(_named(function, variables.modules.values()))
    methods = _methods_of([*values, *named], names_in(function))
    # The function itself has attributes.
    found = [function, *values, *named, *methods]
    return found + [names for names in (variables, defaults) if names]


def names_in(function: Any) -> tuple[str, ...]:
    """Names of globals and attributes in a function's code, and in the functions that it defines."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return () if code is None else _names_of(code)


def nested(code: CodeType) -> Iterator[CodeType]:
    """Code, and that of what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@functools.lru_cache(maxsize=4096)
def _names_of(code: CodeType) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in nested(code) for name in part.co_names))


def _methods_of(owners: list[Any], names: tuple[str, ...]) -> Iterator[FunctionType]:
    """Methods of these objects and classes that go by such a name."""
    for kind in {owner if isinstance(owner, type) else type(owner) for owner in owners}:
        yield from methods_named(kind, names)


def methods_named(kind: type, names: tuple[str, ...]) -> Iterator[FunctionType]:
    """Methods of a class that is no library's, by name."""
    if not is_of_library(kind.__module__):
        for name in names:
            found = inspect.getattr_static(kind, name, None)
            found = getattr(found, "__func__", found)
            if isinstance(found, FunctionType):
                yield found


def is_of_library(module: object) -> bool:
    """Whether a module of this name is torch's, Python's or ours, whose functions count nothing of a model's."""
    return str(module).partition(".")[0] in LIBRARIES


class Given(dict[str, Any]):
    """What somebody has given a function beforehand, by name; ``put`` hands it back where something of it is set."""

    def __init__(self, owner: object, given: dict[str, Any], put: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(given)
        self._owner, self._put = owner, put

    def key(self, name: str) -> Hashable:
        """The same each time that it is looked at."""
        return id(self._owner), name

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._put(self)


def _given_to(partial: functools.partial[Any]) -> Given:
    """Arguments of a partial."""
    unnamed = {f"argument {place}": part for place, part in enumerate(partial.args)}

    def put(given: dict[str, Any]) -> None:
        named = {name: given[name] for name in partial.keywords}
        state: Any = (partial.func, tuple(given[name] for name in unnamed), named, vars(partial))
        partial.__setstate__(state)  # type: ignore[attr-defined]

    return Given(partial, {**unnamed, **partial.keywords}, put)


def _defaults_of(function: FunctionType) -> Given:
    """What parameters are when they are left out, by name: the same list each time."""
    code, defaults = function.__code__, function.__defaults__ or ()
    unnamed = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    named = function.__kwdefaults__ or {}

    def put(given: dict[str, Any]) -> None:
        function.__defaults__ = tuple(given[name] for name in unnamed) or None
        function.__kwdefaults__ = {name: given[name] for name in named} or None

    return Given(function, {**dict(zip(unnamed, defaults, strict=True)), **named}, put)


def _named(function: FunctionType, modules: Iterable[ModuleType]) -> Iterator[Any]:
    """Globals that the function names, and what it names of other ``modules``; not what is a library's."""
    for place in (function.__globals__, *map(vars, modules)):
        for name in names_in(function):
            content = place.get(name)
            content = content() if isinstance(content, weakref.ref) else content
            if _is_plain(content) or not (inspect.ismodule(content) or is_of_library(_home_of(content))):
                yield content


def _is_plain(content: Any) -> bool:
    """Whether it is an object of Python's own, as a dict."""
    return not isinstance(content, type | FunctionType | ModuleType) and type(content).__module__ in PLAIN_HOMES


def _home_of(content: Any) -> object:
    """The module that something is of: of a function that was wrapped that of the wrapper."""
    if isinstance(content, FunctionType):
        return content.__globals__.get("__name__")
    return (content if isinstance(content, type) else type(content)).__module__


def _modules_in(function: FunctionType) -> dict[str, ModuleType]:
    """Modules of somebody's that a function names, by how it names them."""
    names = names_in(function)
    found: dict[str, ModuleType] = {}
    level = {name: function.__globals__.get(name) for name in names}
    while modules := {name: part for name, part in level.items() if isinstance(part, ModuleType)}:
        modules = {k: m for k, m in modules.items() if not is_of_library(m.__name__) and m not in found.values()}
        found |= modules
        level = {f"{label}.{name}": vars(module).get(name) for label, module in modules.items() for name in names}
    return found


def _counted(place: dict[str, Any], code: CodeType, writes: str) -> list[str]:
    """Names of a module that code counts in: by ``writes``, which is an instruction, or in place."""
    return sorted({name for name in _names_of(code) if _changes_in_place(place.get(name))} | _written(code, writes))


def _changes_in_place(content: Any) -> bool:
    """Whether a global counts without being assigned to."""
    if isinstance(content, Tensor | list | set | bytearray | Random | Generator):
        return True
    home = type(content).__module__
    return home in ("collections", "itertools", "array", "queue") or home.startswith("numpy") or _iterates(content)


def _iterates(content: Any) -> bool:
    return isinstance(content, Iterator) and type(content).__module__ == "builtins"


@functools.lru_cache(maxsize=4096)
def _written(code: CodeType, by: str) -> frozenset[str]:
    """Names that a function's code writes."""
    steps = (step for part in nested(code) for step in dis.get_instructions(part))
    return frozenset(step.argval for step in steps if step.opname == by)
