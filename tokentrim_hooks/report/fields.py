"""What a line of a log must hold: its values are checked one by one before anything is drawn, named or added up."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from tokentrim_hooks.report.floats import Floats

REQUIRED = ("video", "chunk", "sample", "start", "frames", "phases")
WHOLE = 2**53
"""Whole numbers are smaller: a JSON reader may know no larger ones."""
LARGE = 1e30
TOKENS = 1 << 22
"""Tokens of a grid at most; a frame of 4K video has 130,000 in models of today."""


def parsed(text: bytes) -> Any:
    """JSON of somebody else's making.

    Raises:
        ValueError: it is none, or nested too deep.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def fields_of(line: bytes) -> dict[str, Any]:
    """The fields of a record, as :class:`ChunkRecord` takes them; those of later versions are left out.

    Raises:
        ValueError: the line is no record, and why.
    """
    values = parsed(line)
    if not isinstance(values, Mapping):
        raise ValueError(f"it is {_short(values)}, not an object")
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    fields = {name: _checked(name, values[name]) for name in KINDS if name in values}
    height, width = fields.get("grid", (0, 0))
    if height * width > TOKENS:
        raise ValueError(f"grid is {height}x{width}, which no model has")
    if any(token >= height * width for token in fields.get("tokens", ())):
        raise ValueError(f"tokens are beyond the grid of {height}x{width}")
    return fields


def _checked(name: str, value: Any) -> Any:
    kind, check = KINDS[name]
    try:
        return check(value)
    except _WrongError:
        raise ValueError(f"{name} is {_short(value)}, not {kind}") from None


class _WrongError(Exception):
    pass


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value) if isinstance(value, (int, float, str, bool)) else type(value).__name__, 60)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < WHOLE:
        raise _WrongError
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _WrongError
    return value


def _measured(value: Any) -> float | None:
    """A number, or None: that is how a record writes one that is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > LARGE:
        raise _WrongError
    return float(value)


def _number(value: Any) -> float:
    measured = _measured(value)
    return math.nan if measured is None else measured


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongError
    return value


def _counts(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise _WrongError
    return {name: _whole(count) for name, count in value.items()}


def _act(value: Any) -> dict[str, Any]:
    """What a policy did: names are texts, everything else is a number."""
    if not isinstance(value, Mapping):
        raise _WrongError
    return {name: (_text if name in ("policy", "hook") else _measured)(part) for name, part in value.items()}


def _grid(value: Any) -> tuple[int, int]:
    sides = _each(_whole)(value)
    if len(sides) != 2:
        raise _WrongError
    return sides[0], sides[1]


def _floats(value: Any) -> Floats:
    """Numbers in four bytes each: a log of 2,000 chunks of 1,560 tokens has three million."""
    return Floats(value if _is_plain(value) else _each(_number)(value))


def _is_plain(value: Any) -> bool:
    """Whether it is a list as a run writes it: seen by loops in C, since single numbers took most of a log's time."""
    if not isinstance(value, list) or not value or not set(map(type, value)) <= {float, int}:
        return False
    return max(map(abs, value)) <= LARGE and math.isfinite(sum(value))  # no NaN hides a large one from max


def _each(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def checked(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _WrongError
        return tuple(check(part) for part in value)

    return checked


CALLS = ("regenerations", "extra_calls", "proof_calls")

KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(
        ("video", "chunk", "sample", "start", "frames", "dead", "anchors", *CALLS),
        ("a whole number", _whole),
    ),
    **dict.fromkeys(
        ("severity", "mean", "std", "threshold", "accepted_severity", "watched", "accepted_watched"),
        ("a number or null", _measured),
    ),
    **dict.fromkeys(("pruned", "given"), ("true or false", _switch)),
    "seconds": ("a number", _number),
    "phases": ("counts by name", _counts),
    "tokens": ("a list of whole numbers", _each(_whole)),
    "drift": ("a list of numbers", _floats),
    "grid": ("two whole numbers", _grid),
    "notes": ("a list of texts", _each(_text)),
    "acts": ("a list of what policies did", _each(_act)),
}
"""Every field with what it is, in words, and what checks it."""
