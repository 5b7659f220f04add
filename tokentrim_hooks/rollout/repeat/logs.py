"""Whether a list is a log: code that is seen to add to it, and never to read how long it is or what is in it."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from itertools import chain
from types import CodeType, FunctionType

from tokentrim_hooks.rollout.repeat.functions import ADDS, nested, outside_of
from tokentrim_hooks.rollout.repeat.keepers import functions_of, keepers_of

VARIABLES = frozenset(("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF", "LOAD_GLOBAL", "LOAD_NAME"))


def only_adds_to(module: object, name: str, variable: bool) -> bool:
    """Whether the code around a denoiser names something ``name`` only where something is added to it.

    Names are all that shows: another thing of the same name that is read counts, and one that is named nowhere is read
    by somebody else. Those of a ``variable``, of a closure or global, are told from those of attributes.
    """
    uses = [adds for code in set(_codes(module)) for adds in _uses(code, name, variable)]
    return bool(uses) and all(uses)


def _codes(module: object) -> Iterator[CodeType]:
    """Code of the classes of a denoiser's parts, of what stands in for a forward, and of their helpers."""
    methods = (vars(kind).values() for kind in keepers_of(module) if isinstance(kind, type))
    running = [(function, *outside_of(function)) for function in functions_of(module)]
    for function in (*chain.from_iterable(methods), *chain.from_iterable(running)):
        function = getattr(function, "__func__", function)
        if isinstance(function, FunctionType):
            yield from nested(function.__code__)


@functools.lru_cache(maxsize=4096)
def _uses(code: CodeType, name: str, variable: bool) -> tuple[bool, ...]:
    """Where code names it: whether something is added to it there."""
    steps = list(dis.get_instructions(code))
    found = []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        named = step.argval == name or (isinstance(step.argval, tuple) and name in step.argval)
        loads = step.opname.startswith("LOAD_") and step.opname != "LOAD_CLOSURE"
        if named and loads and (step.opname in VARIABLES) == variable:
            added = following is not None and following.argval in ADDS and following.opname.startswith("LOAD_")
            found.append(added and step.argval == name)
    return tuple(found)
