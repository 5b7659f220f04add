"""What follows a failure of our own code while a model generates: it is raised, or we warn and step aside."""

from __future__ import annotations

import functools
import signal
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Literal

from tokentrim_hooks.errors import TokenTrimWarning
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


def of_a_signal(failure: BaseException) -> BaseException | None:
    """What a signal handler of the user's has raised while our code ran, as a time limit does; None if it is ours.

    It ends a call as it would anywhere else, whatever ``on_error`` is. Looked for in what ``failure`` was made of, too:
    a TimeoutError is an OSError, of which we make words.
    """
    handlers = set(_handlers())
    found: BaseException | None = failure
    while found is not None:
        step = found.__traceback__
        while step is not None:
            if step.tb_frame.f_code in handlers:
                return found
            step = step.tb_next
        found = found.__cause__
    return None


def _handlers() -> Iterator[CodeType]:
    """The code of all signal handlers that are written in Python."""
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        if not callable(handler):  # SIG_DFL, SIG_IGN, or one of C
            continue
        for each in (handler, getattr(handler, "__func__", None), type(handler).__call__):
            code = getattr(each, "__code__", None)
            if isinstance(code, CodeType):
                yield code
