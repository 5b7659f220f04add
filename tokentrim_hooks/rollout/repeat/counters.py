"""Where a model counts its calls: numbers in what it keeps, how much it keeps, how far its iterators have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.rollout.repeat.counts import Count, count_of, is_setting
from tokentrim_hooks.rollout.repeat.functions import Variables
from tokentrim_hooks.rollout.repeat.keepers import items_of, keepers_of, reachable, take_out
from tokentrim_hooks.rollout.repeat.logs import only_adds_to
from tokentrim_hooks.rollout.repeat.spots import Spot

DEPTH = 7
"""Objects, dicts and lists within one another: diffusers keeps a count in the state of a manager of a hook's."""


@dataclass(frozen=True)
class Changes:
    """What is another thing after a call that was made once more, by name: counts, and settings that it switched.

    Attributes:
        spots: where they are.
    """

    counts: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    spots: list[Spot] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.counts or self.settings)


class Counters:
    """What a module and its parts count in now, to be compared later and put back.

    Args:
        module: the denoiser. latents: that it is called with once more, which nobody may write into meanwhile.
    """

    def __init__(self, module: object, latents: Sequence[Tensor] = ()) -> None:
        self._module = module
        self._latents = [(given, given.clone(), given._version) for given in latents if not given.is_inference()]
        self._kept = [
            (keeper, label, items.keys(), _counts_of(items))
            for keeper, label in reachable(keepers_of(module), DEPTH)
            if (items := items_of(keeper)) or hasattr(keeper, "__dict__")
        ]

    def put_back(self) -> Changes:
        """Put back what has changed since."""
        changed: list[str] = []
        switched: list[str] = []
        spots: list[Spot] = []
        for keeper, label, known, before in self._kept:
            now = items_of(keeper)
            for name, count in before.items():
                if name in now and count.differs(now[name]) and not self._is_log(keeper, name, count, now[name]):
                    count.restore(keeper, name)
                    spots.append(Spot(keeper, name, f"{label}.{name}"))
                    found = switched if count.switches(now[name]) else changed
                    found.append(spots[-1].label + ("" if count.restorable else ", which cannot be put back"))
            for name, count in _new(keeper, now, known):
                take_out(keeper, name)
                if count.counts_if_new:
                    spots.append(Spot(keeper, name, f"{label}.{name}"))
                    (switched if is_setting(now[name]) else changed).append(spots[-1].label)
        return Changes(sorted(set(changed)), sorted(set(switched)), spots)

    def moved_on(self) -> list[Spot]:
        """Where something else is by now, logs too; it is left there."""
        found = []
        for keeper, label, known, before in self._kept:
            now = items_of(keeper)
            names = [name for name, count in before.items() if name in now and count.differs(now[name])]
            names += [name for name, _ in _new(keeper, now, known)]
            found += [Spot(keeper, name, f"{label}.{name}") for name in names]
        return found

    def written(self) -> bool:
        """Whether the latents are other ones by now. Reads the device where somebody has written."""
        return any(v != given._version and not torch.equal(given, copy) for given, copy, v in self._latents)

    def lasting(self) -> list[str]:
        """Names of what could not be put back, should a call move it: a generator cannot be wound back."""
        return [
            f"{label}.{name}"
            for _, label, _, counts in self._kept
            for name, count in counts.items()
            if not count.restorable and not count.over
        ]

    def _is_log(self, keeper: Any, name: Any, count: Count, now: Any) -> bool:
        """Whether it has only grown, and nobody is seen to read what is in it."""
        return count.has_grown(now) and only_adds_to(self._module, str(name), isinstance(keeper, Variables))


def _counts_of(items: dict[Any, Any]) -> dict[Any, Count]:
    counts = ((name, count_of(value)) for name, value in items.items())
    return {name: count for name, count in counts if count is not None}


def _new(keeper: Any, now: dict[Any, Any], known: Any) -> Iterator[tuple[Any, Count]]:
    """Attributes that have come and may count; of mappings and lists it is the size that is compared."""
    if hasattr(keeper, "__dict__") and not isinstance(keeper, type):
        yield from _counts_of({name: value for name, value in now.items() if name not in known}).items()
