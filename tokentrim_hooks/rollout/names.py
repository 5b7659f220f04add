"""Names for what tells videos apart: the memory of a tensor, an object, a number. None of it is kept alive."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Key = tuple[Hashable, ...]
_THEIR_OWN = (int, str, bytes, tuple, frozenset, float)


class Name:
    """Stands for a piece of memory or an object, for as long as that lives; equal to itself only.

    A cache that makes its tensors anew keeps its name: see :meth:`Names.follow`.
    """

    def __init__(self, thing: Any) -> None:
        self.thing: weakref.ref[Any] = weakref.ref(thing)

    @property
    def alive(self) -> bool:
        """Whether what it stands for still exists."""
        return self.thing() is not None


class Names:
    """Hands out the same name for the same thing.

    Tensors are told apart by their memory: samplers, and wrappers such as DDP, make new lists, dicts and views of the
    same cache at every call, and Python hands the ``id()`` of something that is gone to something new.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], Name]] = {}

    def of(self, part: Any) -> Hashable:
        """Name of a tensor (by its memory) or an object; numbers, strings and None are their own.

        Raises:
            TypeError: a list, a dict, or what else cannot be remembered without keeping it alive.
        """
        if not isinstance(part, Tensor) and (part is None or isinstance(part, _THEIR_OWN)):
            return part
        thing = _thing(part)
        found = self._known.get(id(thing))
        if found is not None and found[0]() is thing:
            return found[1]
        return self._remember(thing, Name(thing))

    def key(self, parts: Sequence[Any]) -> Key:
        """Names of several things."""
        return tuple(map(self.of, parts))

    def follow(self, key: Key, parts: Sequence[Any]) -> None:
        """After a call: give ``parts`` the names in ``key``, where they were made anew (a cache that concatenates).

        None tells nothing: a call may have put what it worked with in the place of what it was given.
        """
        for name, part in zip(key, parts, strict=False):
            if isinstance(name, Name) and part is not None and self.of(part) is not name:
                name.thing = weakref.ref(_thing(part))
                self._remember(_thing(part), name)

    def move(self, key: Key, parts: Sequence[Any]) -> None:
        """Give ``parts`` the names in ``key``, whose things may live on under other ones: copies are gone on with."""
        for name in key:
            if isinstance(name, Name):
                self._known.pop(id(name.thing()), None)
        self.follow(key, parts)

    def _remember(self, thing: Any, name: Name) -> Name:
        self._known = {number: entry for number, entry in self._known.items() if entry[0]() is not None}
        self._known[id(thing)] = (weakref.ref(thing), name)
        return name


def gone(key: Key) -> bool:
    """Whether something that a key stands for exists no more: no call can have this key again."""
    return any(isinstance(name, Name) and not name.alive for name in key)


def copied(key: Key, parts: Sequence[Any]) -> bool:
    """Whether the memory in ``parts`` holds, byte by byte, what that holds which a key stands for. Reads the device."""
    pairs = [(name.thing(), part) for name, part in zip(key, parts, strict=False) if isinstance(name, Name)]
    return bool(pairs) and all(isinstance(part, Tensor) and _alike(thing, _thing(part)) for thing, part in pairs)


def _alike(old: Any, new: Any) -> bool:
    if not all(isinstance(part, torch.UntypedStorage) for part in (old, new)) or old.nbytes() != new.nbytes():
        return False
    before, now = (torch.empty(0, dtype=torch.uint8, device=part.device).set_(part) for part in (old, new))
    return torch.equal(before.to(now.device), now)


def _thing(part: Any) -> Any:
    """What is remembered of a tensor or an object. A storage is one object of Python for as long as it lives."""
    if not isinstance(part, Tensor):
        if isinstance(part, list | dict | set):
            raise TypeError(f"a {type(part).__name__} is made anew at any call: name a tensor in it")
        return part
    try:
        return part.untyped_storage()
    except (RuntimeError, NotImplementedError):  # a tensor subclass that only wraps others
        return part
