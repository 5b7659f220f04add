"""Whether a call comes out of the same run of the sampler's loop as an earlier one, told without a look at the device.

Ctrl-C may come in the sampler, between two calls, where no hook of ours is. The next video's first call then looks like
one more denoising call of the chunk that was broken off, until its timestep is read.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from tokentrim_hooks.inspection import is_machinery

BETWEEN = ("accelerate", "contextlib", "functools", "torch", "tokentrim_hooks.handle", "tokentrim_hooks.inspection")
"""Modules whose frames lie between the sampler and a hook, beside what is machinery to everybody."""


class _Mark:
    """Hangs on frames, and lives as long; a frame itself would keep the sampler's variables alive, its cache too."""

    def __call__(self, *_: Any) -> _Mark:
        return self


class Loop:
    """The run of the sampler's loop that makes a chunk: a function's, which may call the denoiser by way of others."""

    def __init__(self) -> None:
        self._mark: weakref.ref[_Mark] | None = None
        self._codes: set[CodeType] = set()

    def begin(self) -> None:
        """The call that is running is its first one."""
        mark = _Mark()
        self._mark = weakref.ref(mark)
        for frame in _sampler() if sys.gettrace() is None else ():
            # Of all that a frame has this alone can be set. Python looks at it only while a debugger is at work.
            if frame.f_trace is None or isinstance(frame.f_trace, _Mark):
                frame.f_trace = mark

    @property
    def goes_on(self) -> bool:
        """Whether it makes the call that is running, too; False where that cannot be told."""
        mark = None if self._mark is None else self._mark()
        for frame in _sampler() if mark is not None else ():
            if frame.f_trace is mark:
                self._codes.add(frame.f_code)
                return True
            if frame.f_code in self._codes:
                return False  # the loop was left, and who called it has called it anew
        return False


def _sampler() -> Iterator[FrameType]:
    """The frame that called the denoiser, and those behind it of the same module."""
    frame: FrameType | None = sys._getframe(1)
    module = None
    while frame is not None:
        if not _is_between(str(frame.f_globals.get("__name__", ""))):
            if module is not None and frame.f_globals is not module:
                return
            module = frame.f_globals
            yield frame
        frame = frame.f_back


def _is_between(name: str) -> bool:
    return is_machinery(name) or any(name == module or name.startswith(f"{module}.") for module in BETWEEN)
