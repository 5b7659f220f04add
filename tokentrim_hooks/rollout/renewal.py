"""Signs, seen on the host, that a call amid a video's first chunk begins another video: what the sampler has renewed.

A method of a user's own class may make several videos in one run, as a pipeline's makes one. Between two calls of a
chunk a sampler writes into no cache; before a video it may zero one, set its indices back, or hand in new tensors. And
the same noise is handed in once more, unwritten. None of it proves anything: the timestep does, which is read then.
Where lists and dicts are made for each call, those of another video look as those of the next call do: not noticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias

from torch import Tensor

from tokentrim_hooks.adapter import Call
from tokentrim_hooks.inspection import shares_storage

DEPTH = 3
"""Lists and dicts within one another: a cache has an entry for each layer."""
Prints: TypeAlias = dict[str, tuple[int, list[Any]]]
"""Of lists and dicts that a call is given, by its arguments' names: where each lies, and what is in it."""


class Renewal:
    """What the calls of a video's first chunk were given, and how they have left it."""

    def __init__(self) -> None:
        self._first: tuple[Tensor, int] | None = None  # held, or others could come to lie there
        self._left: Prints = {}
        self._kept: set[str] = set()

    def begin(self, call: Call) -> None:
        """The chunk's first call."""
        self._first, self._left, self._kept = (call.latents, _version(call.latents)), {}, set()

    def forget(self) -> None:
        """The first chunk is over: let go of the caches."""
        self._left, self._first = {}, None

    def came_back(self, call: Call) -> None:
        """A call of the chunk has come back."""
        left, self._left = self._left, prints_of(call)
        self._kept |= {name for name in left.keys() & self._left.keys() if _is_kept(left[name], self._left[name])}

    def renewed(self, now: Prints) -> bool:
        """Whether something in the caches is another thing than the call before has left there."""
        left = self._left
        return any(self._is_new(name, left[name], now[name]) for name in left.keys() & now.keys())

    def written(self, now: Prints) -> bool:
        """Whether a tensor that the call before has left there was written since: no list made for one call looks so.

        One that lies where the last one lay, and has a tensor of it, cannot be told from it by anything else.
        """
        left = self._left
        return any(_is_written(left[name][1], now[name][1]) for name in left.keys() & now.keys())

    def _is_new(self, name: str, left: tuple[int, list[Any]], now: tuple[int, list[Any]]) -> bool:
        """A cache is the same object in all calls of a chunk; an argument that was made for one call is none."""
        return (name in self._kept or _is_kept(left, now)) and not _alike(left[1], now[1])

    def repeats(self, call: Call) -> bool:
        """Whether it has the first call's noise, which nobody has written into."""
        if self._first is None:
            return False
        noise, version = self._first
        return shares_storage(call.latents, noise) and _version(call.latents) == version


def prints_of(call: Call) -> Prints:
    """Lists and dicts that a call is given: where they lie, and what is in them. Nothing of theirs is held."""
    given = {name: argument for name, argument in call.arguments.items() if isinstance(argument, dict | list)}
    return {name: (id(argument), list(_prints(argument))) for name, argument in given.items()}


def _is_kept(left: tuple[int, list[Any]], now: tuple[int, list[Any]]) -> bool:
    """Whether it is the same list or dict, and no other that came to lie there: a tensor in it is the same, too."""
    return left[0] == now[0] and not _alive(left[1]).isdisjoint(_alive(now[1]))


def _alive(parts: list[Any]) -> set[int]:
    """The tensors among them that somebody has still."""
    return {id(tensor) for part in parts if isinstance(part, tuple) and (tensor := part[0]()) is not None}


def _is_written(left: list[Any], now: list[Any]) -> bool:
    versions = [{id(part[0]()): part[1] for part in parts if isinstance(part, tuple)} for parts in (left, now)]
    return any(versions[1].get(tensor, version) != version for tensor, version in versions[0].items())


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


def _version(tensor: Tensor) -> int:
    """How often it was written; those of inference mode do not say."""
    return -1 if tensor.is_inference() else tensor._version
