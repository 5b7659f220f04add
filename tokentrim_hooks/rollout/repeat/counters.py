"""Where a model counts its calls: plain values in what it keeps."""

from __future__ import annotations

from typing import Any

from tokentrim_hooks.rollout.repeat.keepers import PLAIN, items_of, keepers_of


class Counters:
    """What a module and its parts keep in plain values now, to be compared later and put back."""

    def __init__(self, module: object) -> None:
        self._kept = [(keeper, _values(keeper)) for keeper in keepers_of(module)]

    def put_back(self) -> list[str]:
        """Put back what has changed since; returns the names of it."""
        changed = []
        for keeper, before in self._kept:
            now = _values(keeper)
            for name in [name for name, value in before.items() if name in now and now[name] != value]:
                put(keeper, name, before[name])
                kind = keeper if isinstance(keeper, type) else type(keeper)
                changed.append(f"{kind.__name__}.{name}")
        return sorted(set(changed))


def put(keeper: Any, name: Any, value: Any) -> None:
    """Set an attribute, or an item of a dict or list."""
    if isinstance(keeper, dict | list):
        keeper[name] = value
    else:
        setattr(keeper, name, value)


def _values(keeper: Any) -> dict[Any, Any]:
    return {name: value for name, value in items_of(keeper).items() if isinstance(value, PLAIN)}
