"""Checks of a policy's options: what is out of range is refused when the policy is made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

from tokentrim_hooks.console import meant


def known(policy: type[Any], names: Iterable[str]) -> None:
    """See that a policy has all these options, where it says which it has: where it does not take any (``**more``).

    Raises:
        TypeError: one that it does not have; the message names what it may have meant, and all there are.
    """
    # Not the fields of a dataclass: one with an __init__ of its own, or an InitVar, takes others.
    taken = inspect.signature(policy).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = [parameter.name for parameter in taken if parameter.kind in kinds]
    for name in names:
        if name not in own:
            perhaps = f" ({question})" if (question := meant(name, own)) else ""
            raise TypeError(f"{policy.__name__} has no option {name!r}{perhaps}; known: {', '.join(own) or 'none'}")


def number(name: str, value: object, low: float, high: float, rule: str) -> None:
    """Check an option: a finite number in ``[low, high]``; ``rule`` says so in words.

    Raises:
        ValueError: it is not.
    """
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:  # type: ignore[operator]  # mypy cannot see through `good`
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def whole(name: str, value: object, least: int = 0) -> None:
    """Check an option: a whole number >= ``least``.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def flag(name: str, value: object) -> None:
    """Check an option: True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def one_of(name: str, value: object, *words: str) -> None:
    """Check an option: one of two or more words.

    Raises:
        ValueError: it is none of them.
    """
    if value not in words:
        raise ValueError(f"{name} must be {' or '.join(map(repr, words))}, got {value!r}")
