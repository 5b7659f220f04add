"""Signs, seen on the host, that a call amid a video's first chunk begins another video: what the sampler has renewed.

A method of a user's own class may make several videos in one run, as a pipeline's makes one. Between two calls of a
chunk a sampler writes into no cache; before a video it may zero one, set its indices back, or hand in new tensors. And
the same noise is handed in once more, unwritten. None of it proves anything: the timestep does, which is read then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tokentrim_hooks.adapter import Call

DEPTH = 3
"""Lists and dicts within one another: a cache has an entry for each layer."""


class Renewal:
    """What the calls of a video's first chunk were given, and how they have left it."""

    def __init__(self) -> None:
        self._noise: tuple[int, int] | None = None
        self._left: dict[int, list[Any]] = {}

    def begin(self, call: Call) -> None:
        """The chunk's first call."""
        self._noise, self._left = _memory(call.latents), {}

    def came_back(self, call: Call) -> None:
        """A call of the chunk has come back."""
        self._left = _prints_of(call)

    def renewed(self, call: Call) -> bool:
        """Whether something in the caches is another thing than the call before has left there."""
        left, now = self._left, _prints_of(call)
        return any(not _alike(left[known], now[known]) for known in left.keys() & now.keys())

    def repeats(self, call: Call) -> bool:
        """Whether it has the first call's noise, which nobody has written into."""
        return _memory(call.latents) == self._noise


def _prints_of(call: Call) -> dict[int, list[Any]]:
    """What is in lists and dicts that a call is given, by these: what is made anew for each call is no cache."""
    given = (argument for argument in call.arguments.values() if isinstance(argument, dict | list))
    return {id(argument): list(_prints(argument)) for argument in given}


def _prints(thing: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(thing, dict | list):
        for part in (thing.values() if isinstance(thing, dict) else thing) if depth < DEPTH else ():
            yield from _prints(part, depth + 1)
    elif isinstance(thing, Tensor):
        yield weakref.ref(thing), _version(thing)
    elif isinstance(thing, bool | int | None):
        yield thing


def _alike(left: list[Any], now: list[Any]) -> bool:
    return len(left) == len(now) and all(map(_same, left, now))


def _same(left: Any, now: Any) -> bool:
    if isinstance(left, tuple) and isinstance(now, tuple):
        return left[0]() is now[0]() is not None and left[1] == now[1]
    return type(left) is type(now) and bool(left == now)


def _memory(latents: Tensor) -> tuple[int, int]:
    """Where latents lie, as views of them do, and how often somebody has written there."""
    return latents.untyped_storage().data_ptr(), _version(latents)


def _version(tensor: Tensor) -> int:
    """How often it was written; those of inference mode do not say."""
    return -1 if tensor.is_inference() else tensor._version
