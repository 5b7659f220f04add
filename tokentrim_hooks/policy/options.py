"""Checks of a policy's options: what is out of range is refused when the policy is made."""

from __future__ import annotations

import math


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
