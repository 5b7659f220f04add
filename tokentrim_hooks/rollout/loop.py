"""Whether a call comes out of the same run of the sampler's loop as an earlier one, told without a look at the device.

Ctrl-C may come in the sampler, between two calls, where no hook of ours is. The next video's first call then looks like
one more denoising call of the chunk that was broken off, until its timestep is read. That settles it, but waits for the
device; so it is read only where no method of a pipeline is seen to be running still that made the chunk's first call.

To see that, frames are marked. A frame cannot be referred to weakly, to keep it would keep the sampler's variables (its
cache too), and its ``id`` is another one's afterwards. ``f_trace`` may be set, says Python's reference, in any version;
it is looked at only while a tracer is at work in the thread, and then nothing is marked. One that comes later takes
the mark off (pdb) or calls it, which does nothing; profilers and ``sys.monitoring`` never look. It is no cycle: a frame
holds its mark, the mark holds nothing, and we hold it weakly. A mark that is lost, and a sampler that has no frames
(compiled code), is no method (a loop of the user's own, which may make several videos in one frame) or was seen to make
several videos in one frame, cost a look at the timesteps of a video's first chunk and nothing else. So does what looks
like another video's first call (renewal.py).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn

from tokentrim_hooks.patching.callers import is_machinery, method_of


class _Mark:
    """Hangs on frames, and lives as long as one of them."""

    def __call__(self, *_: Any) -> _Mark:
        return self


class Loop:
    """The run of the sampler's loop that makes a chunk: a method's, which may call the denoiser by way of others."""

    def __init__(self) -> None:
        self._mark: weakref.ref[_Mark] | None = None
        self._loops: set[CodeType] = set()
        self._several: set[CodeType] = set()
        self._asked: CodeType | None = None

    def begin(self) -> None:
        """The call that is running is its first one."""
        mark = _Mark()
        self._mark = weakref.ref(mark) if sys.gettrace() is None else None
        for frame in _callers() if self._mark is not None else ():
            if isinstance(frame.f_trace, _Mark):
                self._several.add(frame.f_code)
            if frame.f_trace is None or isinstance(frame.f_trace, _Mark):
                frame.f_trace = mark

    @property
    def goes_on(self) -> bool | None:
        """Whether it makes the call that is running, too; None where only the timestep can tell."""
        self._asked, mark = None, None if self._mark is None else self._mark()
        new: list[FrameType] = []
        for frame in _callers() if self._mark is not None else ():
            if mark is not None and frame.f_trace is mark:
                return self._is_trusted(frame, new)
            if frame.f_code in self._loops:
                return False
            new.append(frame)
        return None

    def learn(self) -> None:
        """It has turned out that it goes on: the frame that was asked about is the loop's."""
        if self._asked is not None:
            self._loops.add(self._asked)

    def _is_trusted(self, frame: FrameType, new: list[FrameType]) -> bool | None:
        """Whether a frame that made the first call makes this one too, by way of ``new`` ones, and no other video's."""
        if frame.f_code in self._several:
            return None
        if frame.f_code in self._loops:
            return True
        owner = method_of(frame)
        if not _has_models(owner):
            return None
        self._asked = frame.f_code
        if any(other is not owner and _has_models(other) for other in map(method_of, new)):
            return None  # a wrapper of the model's, or it is an application, which has called its pipeline anew
        self.learn()
        return True


def _callers() -> Iterator[FrameType]:
    """The frames that lead to the denoiser, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not is_machinery(frame.f_globals.get("__name__", "")):
            yield frame
        frame = frame.f_back


def _has_models(owner: object) -> bool:
    """Whether an object has models, as a pipeline has, whose method makes one video in one run."""
    attributes = getattr(owner, "__dict__", {})
    kept = (*attributes.values(), *attributes.get("_modules", {}).values())
    return any(isinstance(value, nn.Module) for value in kept)
