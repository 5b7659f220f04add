"""Observers by name: those that installed plugins provide, made when a user asks for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import PluginError, TokenTrimError, UnknownObserverError
from tokentrim_hooks.observers import Observer
from tokentrim_hooks.plugins import ObserverInfo, found, installed


def installed_observers() -> list[ObserverInfo]:
    """List the observers that can be asked for by name, with their distributions."""
    return list(found().observers)


def find_observer(name: str) -> ObserverInfo:
    """The installed observer of that name.

    Raises:
        UnknownObserverError: there is none; the message lists those that there are, and plugins that failed to load.
        PluginError: there are two; the message names both distributions.
    """
    named = [info for info in found().observers if info.name == name]
    if not named:
        known = ", ".join(sorted({info.name for info in found().observers})) or "none"
        broken = [f"{i.name} ({i.distribution}): {i.error}" for i in installed() if i.adapter is None]
        failures = f"; plugins that failed to load: {'; '.join(broken)}" if broken else ""
        raise UnknownObserverError(f"no observer named {name!r}; installed: {known}{failures}")
    if len(named) > 1:
        origins = " and ".join(info.distribution for info in named)
        raise PluginError(f"two observers are named {name!r}, from {origins}; uninstall one of them")
    return named[0]


def make_observer(name: str, folder: str | Path | None = None) -> Observer:
    """Make the installed observer of that name; it writes below ``folder``, or where it usually does if that is None.

    Raises:
        UnknownObserverError, PluginError: as for :func:`find_observer`; or its factory failed.
        MissingExtraError or another TokenTrimError: the factory says what is missing.
    """
    info = find_observer(name)
    try:
        made: Any = info.factory(None if folder is None else Path(folder))
    except TokenTrimError:
        raise
    except Exception as failure:
        message = f"observer {name!r} ({info.distribution}) cannot be made: {type(failure).__name__}: {failure}"
        raise PluginError(message) from failure
    if not isinstance(made, Observer):
        raise PluginError(f"observer {name!r} ({info.distribution}) has no on_chunk: {made!r}")
    return made


def all_made(observers: Iterable[Observer | str]) -> list[Observer]:
    """The observers, names replaced by what :func:`make_observer` makes of them."""
    if isinstance(observers, str):
        raise TypeError(f"observers must be a list, got the string {observers!r}")
    return [make_observer(item) if isinstance(item, str) else item for item in observers]
