"""Places in which calls count, and what is in them at a moment, to be put back there."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokentrim_hooks.rollout.repeat.counts import Count, count_of
from tokentrim_hooks.rollout.repeat.keepers import put, take_out

MISSING: Any = object()
"""What is in a place that does not exist."""


@dataclass(frozen=True)
class Spot:
    """An attribute, a variable or an item: what ``keeper`` keeps as ``name``. ``label`` is what a user calls it."""

    keeper: Any
    name: Any
    label: str

    @cached_property
    def key(self) -> Hashable:
        """Equal for spots that are the same place, as long as it exists: a function's variables are found anew."""
        known = getattr(type(self.keeper), "key", None)
        ours = type(self.keeper).__module__.startswith(__package__ or "")
        return known(self.keeper, self.name) if ours and known is not None else (id(self.keeper), self.name)

    @property
    def content(self) -> Any:
        """What is in it now."""
        keeper, name = self.keeper, self.name
        if isinstance(keeper, MutableMapping | list):
            try:
                return keeper[name]
            except (KeyError, IndexError):
                return MISSING
        own = getattr(keeper, "__dict__", None)
        if own is not None and name in own:
            return own[name]
        return getattr(keeper, name, MISSING) if name in _slots(keeper) else MISSING


class Taken:
    """What is in some spots at a moment."""

    def __init__(self, spots: Iterable[Spot]) -> None:
        self._was = {spot.key: (spot, _Was(spot.content)) for spot in spots}

    @property
    def spots(self) -> list[Spot]:
        """Which."""
        return [spot for spot, _ in self._was.values()]

    def changed(self) -> set[Hashable]:
        """Keys of spots in which something else is by now."""
        return {key for key, (spot, was) in self._was.items() if was.differs(spot.content)}

    def holds(self, key: Hashable) -> bool:
        """Whether a spot is among them, with something in it that can be put back."""
        return key in self._was and self._was[key][1].restorable

    def put_back(self, only: Container[Hashable] | None = None) -> None:
        """As it was, in those of the spots whose keys are given."""
        for key, (spot, was) in self._was.items():
            if only is None or key in only:
                was.restore(spot)


class _Was:
    """What was in a spot: something that counts, as it was; or anything else, by reference."""

    def __init__(self, content: Any) -> None:
        self._content = content
        self._count: Count | None = None if content is MISSING else count_of(content)
        self.restorable = self._count is None or self._count.restorable

    def differs(self, now: Any) -> bool:
        if self._count is None or now is MISSING:
            return now is not self._content
        other = count_of(now)
        return other is None or self._count.differs(now) or type(now) is not type(self._content)

    def restore(self, spot: Spot) -> None:
        if self._content is MISSING:
            if spot.content is not MISSING:
                take_out(spot.keeper, spot.name)
        elif self._count is None:
            put(spot.keeper, spot.name, self._content)
        else:
            self._count.restore(spot.keeper, spot.name)


def _slots(keeper: Any) -> set[str]:
    declared = (vars(kind).get("__slots__", ()) for kind in type(keeper).__mro__)
    return {name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)}
