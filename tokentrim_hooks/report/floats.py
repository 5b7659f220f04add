"""A compact sequence of floats."""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence
from typing import Any, overload


def four_digits(value: float) -> float:
    """A number as a log has it."""
    return float(f"{value:.4g}")


class Floats(Sequence[float]):
    """Numbers to about seven digits in four bytes each: a tuple of Python's floats takes eight times as much."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._values = array.array("f", values)

    @classmethod
    def packed(cls, memory: bytes | bytearray) -> Floats:
        """From the memory of float32 numbers in this machine's byte order."""
        made = cls()
        made._values.frombytes(memory)
        return made

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> Floats: ...

    def __getitem__(self, index: int | slice) -> float | Floats:
        return Floats(self._values[index]) if isinstance(index, slice) else self._values[index]

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same numbers, to the four digits that a log has of them."""
        return isinstance(other, Sequence) and list(map(four_digits, self)) == list(map(four_digits, other))

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Floats:
        return self

    def __repr__(self) -> str:
        return f"Floats({list(self)!r})"
