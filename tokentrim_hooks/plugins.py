"""Finding adapters, observers and policies: built-in and third-party ones come through the same entry points.

A name belongs to one of them. The built-in one has it before any third party's; of two third parties' neither has it,
for no order between them would be what their user meant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tokentrim_hooks.console import meant
from tokentrim_hooks.errors import PluginError, TokenTrimError, UnknownObserverError, UnknownPolicyError
from tokentrim_hooks.extras import missing
from tokentrim_hooks.loading import (
    FAILURES,
    AdapterInfo,
    Found,
    ObserverInfo,
    Point,
    PolicyInfo,
    installed_points,
    load,
    plain,
    project_of,
    tokentrim_adapters,
    tokentrim_observers,
    tokentrim_policies,
    why,
)
from tokentrim_hooks.policy import options as checks
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.report.files import named
from tokentrim_hooks.report.observers import Observer

DISABLE = "TOKENTRIM_DISABLE_ADAPTERS"
OURS = "tokentrim-hooks"
Info = TypeVar("Info", AdapterInfo, ObserverInfo, PolicyInfo)
Named = TypeVar("Named", ObserverInfo, PolicyInfo)


class _Finder:
    """Answers what installed plugins provide. Each is loaded once per process, when it is wanted and not disabled."""

    def __init__(self) -> None:
        self.cache_clear()

    def cache_clear(self) -> None:
        """Forget it all: something was installed."""
        self._points: list[Point] | None = None
        self._loaded: dict[Point, Found] = {}

    def __call__(self) -> Found:
        """What the plugins provide, names settled; which are disabled is read from the environment anew."""
        if self._points is None:
            self._points = installed_points()
        every = [self._of(point, disabled_names()) for point in self._points]
        adapters = _with_owners([info for found in every for info in found.adapters])
        adapters.sort(key=lambda info: (info.adapter is None, info.name, info.distribution))
        observers = _settled([info for found in every for info in found.observers])
        return Found(tuple(adapters), observers, _settled([info for found in every for info in found.policies]))

    def _of(self, point: Point, off: dict[str, str]) -> Found:
        """One plugin; code that is disabled is not even imported."""
        if off.keys() & {plain(point.name), plain(project_of(point.distribution))}:
            name, words = off.get(plain(point.name), point.name), f"named in {DISABLE}: its code was not imported"
            return Found((AdapterInfo(name, point.distribution, None, words, disabled=True),))
        if point not in self._loaded:
            self._loaded[point] = load(point)
        return self._loaded[point]


found = _Finder()


def disabled_names() -> dict[str, str]:
    """What ``TOKENTRIM_DISABLE_ADAPTERS`` names now, as written, by the plain form of it."""
    return {plain(name.strip()): name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()}


def installed_adapters() -> list[AdapterInfo]:
    """All installed adapters: those that failed to load, have lost their name or are disabled included.

    ``TOKENTRIM_DISABLE_ADAPTERS=name,name`` disables adapters by their name, and plugins by that of their entry point
    or distribution; the code of the latter is not imported.
    """
    off = disabled_names()
    return [replace(info, disabled=info.disabled or plain(info.name) in off) for info in found().adapters]


def usable_adapters() -> list[AdapterInfo]:
    """Those of them that take part in detection: loaded and not disabled."""
    return [info for info in installed_adapters() if info.adapter is not None and not info.disabled]


def left_out() -> list[AdapterInfo]:
    """Those that would take part, but failed to load or do not own their name."""
    return [info for info in installed_adapters() if info.adapter is None and not info.disabled]


def _distinct(infos: Sequence[Info]) -> list[Info]:
    """The same, one that comes twice from one distribution once."""
    kept: list[Info] = []
    for info in infos:
        if info not in kept:
            kept.append(info)
    return kept


def _with_owners(infos: Sequence[AdapterInfo]) -> list[AdapterInfo]:
    """Those whose name is somebody else's have lost their adapter, and say to whom."""
    claims = [info for info in _distinct(infos) if info.adapter is not None]
    failed = [info for info in infos if info.adapter is None]
    lost = {id(info): _why_lost(info, [c for c in claims if c.name == info.name]) for info in claims}
    return failed + [
        replace(info, adapter=None, error=lost[id(info)], shadowed=True) if lost[id(info)] else info for info in claims
    ]


def _settled(infos: Sequence[Named]) -> tuple[Named, ...]:
    """By name; those whose name is somebody else's say whose."""
    claims = _distinct(infos)
    owned = [replace(info, error=_why_lost(info, [c for c in claims if c.name == info.name])) for info in claims]
    return tuple(sorted(owned, key=lambda info: (info.name, info.distribution)))


def _why_lost(info: Info, claims: Sequence[Info]) -> str:
    """Why ``info`` does not own the name that all ``claims`` have; nothing if it does."""
    built_in = [claim for claim in claims if plain(project_of(claim.distribution)) == OURS]
    if len(claims) == 1 or (built_in and info is built_in[0]):
        return ""
    if built_in:
        return f"{built_in[0].distribution} has a built-in one of this name, which is used; rename this one"
    rivals = sorted({claim.distribution for claim in claims if claim is not info})
    return (
        f"{' and '.join(rivals)} has one of this name too, so none of them is used; uninstall all but one, or name the "
        f"others' distributions in {DISABLE}"
    )


def installed_observers() -> list[ObserverInfo]:
    """List the observers of installed plugins, with their distributions; one that cannot be asked for has an error."""
    return list(found().observers)


def find_observer(name: str) -> ObserverInfo:
    """The installed observer of that name.

    Raises:
        UnknownObserverError: there is none; the message lists those that there are, and plugins that failed to load.
        PluginError: there are two; the message names both distributions.
    """
    return _named("observer", "observers", name, found().observers, UnknownObserverError)


def ready_observer(name: str) -> ObserverInfo:
    """The installed observer of that name, if the libraries that it needs are installed too.

    Raises:
        UnknownObserverError, PluginError: as for :func:`find_observer`. MissingExtraError: a library is missing.
    """
    info = find_observer(name)
    if info.missing:
        raise missing(f"the observer {name!r}", info.missing, info.missing)
    return info


def _named(kind: str, kinds: str, name: str, infos: Sequence[Named], unknown: Callable[[str], TokenTrimError]) -> Named:
    """The one of ``infos`` that owns ``name``."""
    named = [info for info in infos if info.name == name]
    usable = [info for info in named if not info.error]
    if usable:
        return usable[0]
    if named:
        origins = " and ".join(info.distribution for info in named)
        raise PluginError(
            f"two {kinds} are named {name!r}, from {origins}; uninstall one of them, or name it in {DISABLE}"
        )
    known = sorted({info.name for info in infos if not info.error})
    classes = {type_of.__name__: info.name for info in infos if (type_of := getattr(info, "policy", None))}
    raise unknown(f"{no_such(kind, classes.get(str(name), name), known, name)}{not_used()}")


def no_such(kind: str, name: str, known: Iterable[str], given: str | None = None) -> str:
    """A message: nothing of this kind has the name; which one may have been meant, and all there are.

    ``given`` is what was said, where ``name`` is what that stands for: the name of a policy, for that of its class.
    """
    there = list(known)
    said = name if given is None else given
    words = (f"no {kind} named {said!r};", meant(str(name), there), f"installed: {', '.join(there) or 'none'}")
    return " ".join(filter(None, words))


def not_used() -> str:
    """For the end of a message: plugins that failed to load, or whose name is taken, for one may be what is missing."""
    names = ", ".join(dict.fromkeys(info.name for info in left_out()))
    return f"; not used: {names} (see `tokentrim adapters`)" if names else ""


def make_observer(name: str, folder: str | Path | None = None) -> Observer:
    """Make the installed observer of that name; it writes below ``folder``, or where it usually does if that is None.

    Raises:
        UnknownObserverError, PluginError: as for :func:`find_observer`; or its factory failed.
        MissingExtraError: a library that it needs is missing. Another TokenTrimError: its factory says why.
    """
    info = ready_observer(name)
    try:
        made: Any = info.factory(None if folder is None else named(folder))
        watches = isinstance(made, Observer) and callable(made.on_chunk)
    except TokenTrimError:
        raise
    except FAILURES as failure:
        message = f"observer {name!r} ({info.distribution}) cannot be made: {why(failure)}"
        raise PluginError(message) from failure
    if not watches:
        raise PluginError(f"observer {name!r} ({info.distribution}) has no on_chunk; give it one: {made!r}")
    return made  # type: ignore[no-any-return]


def all_made(observers: Iterable[Observer | str]) -> list[Observer]:
    """The observers, names replaced by what :func:`make_observer` makes of them."""
    if isinstance(observers, str) or not isinstance(observers, Iterable):
        raise TypeError(f"observers must be a list (of objects with on_chunk, or of names), got {observers!r}")
    made = [make_observer(item) if isinstance(item, str) else item for item in observers]
    for item in made:
        if not callable(getattr(item, "on_chunk", None)):
            raise TypeError(f"an observer must have on_chunk(records, latents), got {item!r}")
    return made


def installed_policies() -> list[PolicyInfo]:
    """The policies of installed plugins, by name; one whose name is somebody else's too has an error."""
    return list(found().policies)


def find_policy(name: str) -> PolicyInfo:
    """The installed policy of that name.

    Raises:
        UnknownPolicyError: there is none; the message lists those that there are, and plugins that failed to load.
        PluginError: there are two; the message names both distributions.
    """
    return _named("policy", "policies", name, found().policies, UnknownPolicyError)


def make_policy(name: str, **options: Any) -> Policy:
    """Make the installed policy of that name.

    Raises:
        UnknownPolicyError, PluginError: as for :func:`find_policy`; or the policy itself failed.
        TypeError: an option that it does not have. ValueError: a value out of range.
    """
    info = find_policy(name)
    try:
        checks.known(info.policy, options)
        return info.policy(**options)
    except (TokenTrimError, TypeError, ValueError):
        raise
    except FAILURES as failure:
        raise PluginError(f"policy {name!r} ({info.distribution}) cannot be made: {why(failure)}") from failure


__all__ = [
    "AdapterInfo",
    "Found",
    "ObserverInfo",
    "PolicyInfo",
    "all_made",
    "find_observer",
    "find_policy",
    "found",
    "installed_adapters",
    "installed_observers",
    "installed_policies",
    "left_out",
    "make_observer",
    "make_policy",
    "no_such",
    "ready_observer",
    "tokentrim_adapters",
    "tokentrim_observers",
    "tokentrim_policies",
    "usable_adapters",
]
