"""What follows a failure of our own code while a model generates: it is raised, or we warn and step aside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

from tokentrim_hooks.errors import TokenTrimWarning

OnError = Literal["raise", "warn"]


class FailurePolicy:
    """One per patched model, shared by all its parts, so that they step aside together.

    Args:
        on_error: ``"raise"``, or ``"warn"``: after the first failure generation goes on unpatched, with one warning.
    """

    def __init__(self, on_error: OnError = "raise") -> None:
        self.stepped_aside = False
        self._on_error = on_error
        self._cleanups: list[Callable[[], None]] = []

    def on_step_aside(self, cleanup: Callable[[], None]) -> None:
        """Run ``cleanup`` when we step aside: no mark may stay in a cache that nobody taps any more."""
        self._cleanups.append(cleanup)

    def forgives(self, failure: Exception) -> bool:
        """Whether generation goes on without us after ``failure``; if not, the caller raises it."""
        if self._on_error == "warn" and not self.stepped_aside:
            self._step_aside(failure)
        return self.stepped_aside

    def _step_aside(self, failure: Exception) -> None:
        self.stepped_aside = True
        for cleanup in self._cleanups:
            cleanup()
        warnings.warn(
            f"tokentrim stepped aside, generation goes on unpatched: {type(failure).__name__}: {failure}",
            TokenTrimWarning,
            stacklevel=5,
        )
