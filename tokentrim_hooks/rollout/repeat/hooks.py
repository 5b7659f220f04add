"""Hooks of other people on a denoiser and its parts: which of them may change what a call gives."""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as everywhere

from tokentrim_hooks.rollout.repeat.functions import ADDS, is_of_library, outside_of

PLACES = ("_forward_pre_hooks", "_forward_hooks")
CHANGES = frozenset(("update", "setdefault", "pop", "popitem", "clear", "setattr"))
"""What changes a dict or an object of the call; in place names of torch end in an underscore."""

GIVE_NOTHING = ADDS | {"print", "setattr"}


def hooks_of(module: object) -> Iterator[Any]:
    """Hooks of a module, of its parts and of all modules, where they may change what a call gives.

    One that only watches may count what it likes, as profilers and progress bars do.
    """
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    places = [vars(part)[place] for part in parts for place in PLACES if vars(part)[place]]
    places += [getattr(everywhere, f"_global{place}") for place in PLACES]
    for hook in itertools.chain(*(place.values() for place in places), _of_accelerate(parts)):
        # An object's own method, so that what the object keeps is seen.
        hook = hook if isinstance(hook, FunctionType | MethodType | functools.partial) else hook.__call__
        function = _function_of(hook)
        if function is not None and not is_of_library(function.__globals__.get("__name__")) and _acts(function):
            yield hook


def _of_accelerate(parts: list[nn.Module]) -> Iterator[Any]:
    """Methods of hooks that accelerate calls around a forward; its own move weights, and nothing else."""
    for hook in (vars(part).get("_hf_hook") for part in parts):
        if hook is not None and not type(hook).__module__.startswith("accelerate."):
            yield from (hook.pre_forward, hook.post_forward)


def _function_of(hook: Any) -> FunctionType | None:
    """The function behind a hook, which may be a method or a partial; None where it is not written in Python."""
    while isinstance(hook, functools.partial | MethodType):
        hook = hook.func if isinstance(hook, functools.partial) else hook.__func__
    return hook if isinstance(hook, FunctionType) else None


def _acts(function: FunctionType) -> bool:
    """Whether it gives something back, or is seen to write into what it is given."""
    code, helpers = function.__code__, [part for part in outside_of(function) if isinstance(part, FunctionType)]
    if _returns(code, frozenset(part.__name__ for part in helpers if not _returns(part.__code__))):
        return True
    takes = set(code.co_varnames[1:])
    if not takes.intersection(name for step in dis.get_instructions(code) for name in _locals(step)):
        return False
    return _writes(code, code.co_varnames[0]) or any(_writes(part.__code__, "self") for part in helpers)


@functools.lru_cache(maxsize=4096)
def _returns(code: CodeType, quiet: frozenset[str] = frozenset()) -> bool:
    """Whether a function's code may give something back that it was not given; ``quiet`` functions give nothing."""
    steps = list(dis.get_instructions(code))
    return any(
        # One that is jumped to is the end of a choice: ``x if seen else None``.
        (step.opname == "RETURN_VALUE" and (step.is_jump_target or not _is_nothing(code, steps, place, quiet)))
        or (step.opname == "RETURN_CONST" and step.argval is not None)
        for place, step in enumerate(steps)
    )


def _is_nothing(code: CodeType, steps: list[dis.Instruction], end: int, quiet: frozenset[str]) -> bool:
    """Whether what ends before an instruction is None, what was given, or a call of what gives None, as ``append``."""
    if steps[end - 1].opname.endswith("_CONST"):
        return steps[end - 1].argval is None
    stored = {name for step in steps for name in _locals(step, "STORE_FAST")}
    given = set(code.co_varnames) - stored
    if all(step.opname == "BUILD_TUPLE" or _locals(step) & given for step in steps[_begin(steps, end) : end]):
        return True
    if not steps[end - 1].opname.startswith("CALL"):
        return False
    first, *others = (step for step in steps[_begin(steps, end) : end] if step.opname != "PUSH_NULL")
    called = [first, *itertools.takewhile(lambda step: step.opname in ("LOAD_ATTR", "LOAD_METHOD"), others)][-1]
    return called.argval in GIVE_NOTHING or called.argval in quiet


@functools.lru_cache(maxsize=4096)
def _writes(code: CodeType, own: str) -> bool:
    """Whether code writes into something that it has in a variable of its own; its object, ``own``, is no such one."""
    if any(name in CHANGES or (name.endswith("_") and not name.endswith("__")) for name in code.co_names):
        return True
    steps = list(dis.get_instructions(code))
    for place, step in enumerate(steps):
        if step.opname in ("STORE_SUBSCR", "STORE_ATTR"):
            end = _begin(steps, place) if step.opname == "STORE_SUBSCR" else place
            if any(_locals(part) - {own} for part in steps[_begin(steps, end) : end]):
                return True
        if _in_place(step) and _locals(steps[place + 1], "STORE_FAST"):
            return True
    return False


def _begin(steps: list[dis.Instruction], end: int) -> int:
    """Where the expression begins that ends before instruction ``end``: it leaves one thing on the stack."""
    left = 0
    while end and left != 1:
        end -= 1
        left += dis.stack_effect(steps[end].opcode, steps[end].arg, jump=False)
    return end


def _in_place(step: dis.Instruction) -> bool:
    """``a *= b``, by the names that versions of Python have for it."""
    return step.opname.startswith("INPLACE_") or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))


def _locals(step: dis.Instruction, kind: str = "LOAD_FAST") -> set[str]:
    """Variables of its own that an instruction reads; later versions read two at once."""
    if not step.opname.startswith(kind):
        return set()
    return set(step.argval) if isinstance(step.argval, tuple) else {str(step.argval)}
