"""Which denoiser calls are running, and whether the code that asks is inside one of them.

A call can end in ways that no hook sees: torch runs ``always_call`` hooks for ``Exception`` only, so after Ctrl-C, a
timeout or a cancelled task nothing tells us that the call is over; and any of our own lines may be the one that is
interrupted. So a scope is never trusted to have been left. It is tied to the frame of the call that opened it, and
counts only while that frame is executing.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

from tokentrim_hooks.pruning.tap import CallTap

OURS = ("tokentrim_hooks", "torch._dynamo", "contextlib")
"""Modules whose frames lie between a call and the hook that watches it."""


def executes(frame: FrameType | None) -> bool:
    """Whether a frame is executing, in whatever thread. One that has ended lets go of its variables."""
    try:
        # A frame that is executing refuses to be cleared; one that has ended does not.
        if frame is not None:
            frame.clear()
    except RuntimeError:
        return True
    return False


class CallScope:
    """One running denoiser call.

    Args:
        tap: what the attention tap knows in it; None while nothing is dead.
        frame: the frame that lasts as long as the call.
        outer: the scope that it was opened in.
        replayer: who makes the call, where it is a replay of ours.
        note: what whoever opened it keeps with the call.

    Attributes:
        depth: self-attention modules that have been entered in it.
    """

    def __init__(
        self,
        tap: CallTap | None,
        frame: FrameType,
        outer: CallScope | None,
        replayer: object = None,
        note: object = None,
    ) -> None:
        self.tap: CallTap | None = tap
        self.outer = outer
        self.replayer = replayer
        self.note = note
        self.depth = 0
        self._frame: FrameType | None = frame

    @property
    def open(self) -> bool:
        """Whether nobody has closed it."""
        return self._frame is not None

    @property
    def runs(self) -> bool:
        """Whether the call is still under way."""
        return executes(self._frame)

    @property
    def running(self) -> bool:
        """Whether the call is still under way. Closes the scope if it is not."""
        if executes(self._frame):
            return True
        if self._frame is not None:
            self.close()
        return False

    @property
    def encloses(self) -> bool:
        """Whether the code that asks runs inside this call, in this thread or task."""
        scope = current_scope()
        while scope is not None and scope is not self:
            scope = scope.outer
        return scope is self

    def belongs_to(self, frame: FrameType) -> bool:
        """Whether ``frame`` is that of the call."""
        return self._frame is frame

    def begin(self, tap: CallTap | None, note: object) -> None:
        """The call itself comes now, after what was done in its scope before: with this tap, and this note."""
        if self._frame is None:
            return
        self.tap, self.note = tap, note
        if tap is not None:
            BUSY.add(self)

    def close(self) -> None:
        """The call is over: let go of its tap and of its frame, and with that of the call's arguments."""
        if self.tap is not None:
            BUSY.drop(self)
        self.tap = self._frame = self.note = None


class Busy:
    """Whether anything is dead in the context of any running call of the process.

    ``now`` is the truth, which costs a look at the calls under way. ``maybe`` is a plain attribute, which compiled code
    can guard on: while it is False, tapped functions run as if they were not tapped, without a graph break. Nothing
    runs when Ctrl-C ends a call, so it may stay True until somebody looks: whatever reads ``now`` or the handle or
    calls the denoiser, a tapped function (which asks for its scope before it does anything), and torch before it
    compiles, so that no graph is made for a call that has ended. Where Ctrl-C comes in attention or in compiled code,
    as it mostly does, :func:`end_with` sees it on its way out.
    """

    def __init__(self) -> None:
        self.maybe = False
        self._scopes: set[CallScope] = set()
        self._lock = threading.RLock()

    @property
    def now(self) -> bool:
        """Whether a call is under way, in whatever thread, in which something is dead."""
        self.sweep()
        return self.maybe

    def add(self, scope: CallScope) -> None:
        """A call begins in which something is dead."""
        with self._lock:
            self._scopes.add(scope)
            self.maybe = True

    def drop(self, scope: CallScope) -> None:
        """A call has ended."""
        with self._lock:
            self._scopes.discard(scope)
            self.maybe = bool(self._scopes)

    def sweep(self) -> None:
        """Drop calls that have ended unseen."""
        for scope in list(self._scopes):
            scope.running  # noqa: B018 - closes itself
        if self.maybe and not self._scopes:
            # Ctrl-C has come in `drop`, between its lines.
            with self._lock:
                self.maybe = bool(self._scopes)


BUSY = Busy()

_current: ContextVar[CallScope | None] = ContextVar("tokentrim_call", default=None)


def current_scope() -> CallScope | None:
    """The innermost denoiser call that is running in this thread or task."""
    scope = given = _current.get()
    while scope is not None and not scope.running:
        scope = scope.outer
    if scope is not given:
        _current.set(scope)
    if scope is None and BUSY.maybe:
        BUSY.sweep()
    return scope


def current_tap() -> CallTap | None:
    """The tap of the denoiser call that is running in this thread or task, if something in its context is dead."""
    scope = current_scope()
    return None if scope is None else scope.tap


def scope_of_call() -> CallScope | None:
    """The scope that was opened for the very call whose hook is running; None if there is none."""
    scope = _current.get()
    if scope is None:
        return None
    # What our own code runs in is under way: that need not be asked.
    frame = _frame_of_call()
    if scope.belongs_to(frame):
        return scope
    scope = current_scope()
    return scope if scope is not None and scope.belongs_to(frame) else None


def end_with(failure: BaseException) -> None:
    """Where ``failure`` comes out of a part of a denoiser: Ctrl-C, a timeout or a cancelled task ends all calls around.

    No hook sees them, and what is noticed here is not left to whoever looks next: compiled code finds nothing busy.
    """
    scope = None if isinstance(failure, Exception) else _current.get()
    while scope is not None:
        scope.close()
        scope = scope.outer


def open_scope(tap: CallTap | None, replayer: object = None, note: object = None) -> CallScope:
    """Open a scope for the denoiser call whose hook is running."""
    scope = CallScope(tap, _frame_of_call(), current_scope(), replayer, note)
    if tap is not None:
        BUSY.add(scope)
    _current.set(scope)
    return scope


@contextmanager
def scoped(tap: CallTap | None, replayer: object = None) -> Iterator[CallScope]:
    """A scope for the duration of a block."""
    scope = open_scope(tap, replayer)
    try:
        yield scope
    finally:
        scope.close()
        current_scope()


def _frame_of_call() -> FrameType:
    """The frame behind our hook: that of ``nn.Module.__call__``, which lasts as long as the call."""
    frame: FrameType | None = sys._getframe(1)
    last = frame
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        last, frame = frame, frame.f_back
    found = frame or last
    assert found is not None, "there is always a caller"
    return found


@functools.lru_cache(maxsize=1024)
def _is_ours(module: object) -> bool:
    """Whether a module of this name lies between a call and the hook that watches it."""
    return str(module).startswith(OURS)
