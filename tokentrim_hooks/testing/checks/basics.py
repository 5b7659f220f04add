"""What all parts of the kit use: open questions, counted calls, comparisons, and a run without pytest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from tokentrim_hooks.testing.attention import Denoiser, around_calls


class Injected(Exception):
    """Raised by the kit in the middle of a model's call."""


def not_checked(reason: str) -> SkipTest:
    """The skip that says loudly that something was not checked."""
    return SkipTest(f"NOT CHECKED: {reason}")


@dataclass
class Counter:
    """Counts calls of :meth:`up`."""

    count: int = 0

    def up(self) -> None:
        """Count one more call."""
        self.count += 1


@contextmanager
def counting(denoisers: Sequence[Denoiser]) -> Iterator[Counter]:
    """Count the denoisers' calls in a block, replays included."""
    calls = Counter()
    with around_calls(denoisers, calls.up):
        yield calls


def assert_raises(kind: type[BaseException], action: Callable[[], object]) -> None:
    """Assert that ``action`` raises ``kind``."""
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that the largest difference is at most ``tolerance`` times the largest expected value."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)}, {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "NaN or inf in the pruned run"
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"the pruned run is {error:.2e} away from its -inf reference (allowed {tolerance:.0e})"


def failures(kit: type[Any], only: Collection[str] = ()) -> dict[str, str]:
    """Run a conformance class (or ``only`` some tests of it) without pytest.

    Returns:
        What failed and why, by the name of the test; and what could not be checked, whose reason begins with
        ``NOT CHECKED``. Only what passed is not in it.
    """
    found = {}
    for name in sorted(only or (name for name in dir(kit) if name.startswith("test_"))):
        try:
            getattr(kit(), name)()
        except SkipTest as open_question:
            found[name] = str(open_question)
        except Exception as failure:
            found[name] = f"{type(failure).__name__}: {failure}"
    return found
