"""What follows a failure of our own code while a model generates: it is raised, or we warn and step aside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

from tokentrim_hooks.errors import TokenTrimWarning, of_a_signal
from tokentrim_hooks.ranks.agreement import Alone

OnError = Literal["raise", "warn"]


class FailurePolicy:
    """One per patched model, shared by all its parts, so that they step aside together.

    Args:
        on_error: ``"raise"``, or ``"warn"``: after the first failure generation goes on unpatched, with one warning.

    Attributes:
        stepped_aside: whether generation goes on without us: for good, or until a failure that waits is raised.
        ranks: the processes that the model is shared with, which step aside, or raise, together.
    """

    def __init__(self, on_error: OnError = "raise") -> None:
        self.stepped_aside = False
        self.ranks = Alone()
        self._on_error = on_error
        self._waiting: Exception | None = None
        self._cleanups: list[Callable[[], None]] = []
        self._midway = False

    @property
    def warns(self) -> bool:
        """Whether a failure costs no video: generation goes on without us."""
        return self._on_error == "warn"

    def on_step_aside(self, cleanup: Callable[[], None]) -> None:
        """Run ``cleanup`` when we step aside: no mark may stay in a cache that nobody taps any more.

        Once more when the call in which we did has come back: it may write late what it had made of marked rows.
        """
        self._cleanups.append(cleanup)

    def hears(self, failure: Exception) -> bool:
        """Whether a failure is kept until the ranks agree next, so that this one makes the calls that all make."""
        if not self.ranks.hears(failure):
            return False
        self._clean()
        return True

    def forgives(self, failure: Exception) -> bool:
        """Whether generation goes on without us after ``failure``; if not, the caller raises it."""
        if of_a_signal(failure) is not None:
            return False
        if self.hears(failure):
            return True
        if self.stepped_aside:
            return True
        waits = self.ranks.tell(failure)
        if self._on_error == "warn":
            self._step_aside(failure)
        elif waits:
            self.stepped_aside, self._waiting = True, failure
            self._clean()
        return self.stepped_aside

    def stand_by(self, ended: bool) -> None:
        """A call begins or has ``ended`` while we are aside; raises a failure that has waited for the other ranks."""
        if not ended:
            self.ranks.enter()
            return
        if self._midway:
            self._clean()
            self._midway = False
        if self._waiting is not None and self.ranks.is_due():
            self.raise_waiting()

    def raise_waiting(self) -> None:
        """Raise a failure that waits for the other ranks, if there is one; then we are back."""
        failure, self._waiting = self._waiting, None
        if failure is not None:
            self.stepped_aside = False
            raise failure

    def _clean(self) -> None:
        self._midway = True
        for cleanup in self._cleanups:
            cleanup()

    def _step_aside(self, failure: Exception) -> None:
        self.stepped_aside = True
        self._clean()
        words = "\n".join(str(failure).splitlines()[:2])  # torch's own may go on for a screen
        warnings.warn(
            f"tokentrim stepped aside, generation goes on unpatched: {type(failure).__name__}: {words}",
            TokenTrimWarning,
            stacklevel=5,
        )
