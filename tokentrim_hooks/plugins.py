"""Finding adapters and observers: built-in and third-party ones come through the same entry points."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from tokentrim_hooks.adapter import Adapter
from tokentrim_hooks.errors import PluginError, TokenTrimError, UnknownObserverError
from tokentrim_hooks.markers import GROUP, hookspec
from tokentrim_hooks.report.observers import Observer, ObserverFactory

DISABLE = "TOKENTRIM_DISABLE_ADAPTERS"



@hookspec
def tokentrim_adapters() -> Sequence[type[Adapter[Any]]]:  # type: ignore[empty-body]
    """Return the adapter classes that this plugin provides."""


@hookspec
def tokentrim_observers() -> Mapping[str, ObserverFactory]:  # type: ignore[empty-body]
    """Return the observers that this plugin provides, by name: nothing observes until a user asks for it by that name.

    A factory is called once per patched model. It imports its library, so that the library is needed only by those who
    ask for the observer, and leaves the opening of files to ``on_start``.
    """


@dataclass(frozen=True)
class AdapterInfo:
    """An installed adapter, or a plugin that failed to load (then ``adapter`` is None and ``error`` says why)."""

    name: str
    distribution: str
    adapter: type[Adapter[Any]] | None = None
    error: str = ""
    disabled: bool = False

    @property
    def loaded(self) -> type[Adapter[Any]]:
        """The adapter's class.

        Raises:
            PluginError: the plugin failed to load.
        """
        if self.adapter is None:
            raise PluginError(f"plugin {self.name!r} ({self.distribution}) failed to load: {self.error}")
        return self.adapter


@dataclass(frozen=True)
class ObserverInfo:
    """An observer that can be asked for by name."""

    name: str
    distribution: str
    factory: ObserverFactory


@dataclass(frozen=True)
class Found:
    """What the installed plugins provide; those that failed to load stand among the adapters, with their error."""

    adapters: tuple[AdapterInfo, ...]
    observers: tuple[ObserverInfo, ...]


def load(points: Sequence[EntryPoint]) -> Found:
    """Load plugins in a fixed order, each in its own try; raise PluginError only for two adapters of one name."""
    adapters: list[AdapterInfo] = []
    observers: list[ObserverInfo] = []
    for point in sorted(points, key=lambda p: (_distribution(p), p.name)):
        loaded = _load_one(point)
        adapters.extend(loaded.adapters)
        observers.extend(loaded.observers)
    _refuse_duplicates(adapters)
    adapters.sort(key=lambda info: (info.adapter is None, info.name))
    return Found(tuple(adapters), tuple(sorted(observers, key=lambda info: (info.name, info.distribution))))


@functools.cache
def found() -> Found:
    """What all installed plugins provide, loaded once per process."""
    return load(list(entry_points(group=GROUP)))


def installed_adapters() -> list[AdapterInfo]:
    """All installed adapters, those that failed to load included; which are disabled is read from the environment anew.

    ``TOKENTRIM_DISABLE_ADAPTERS=name,name`` disables adapters by name.
    """
    off = {name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    return [replace(info, disabled=info.name in off) for info in found().adapters]


def usable_adapters() -> list[AdapterInfo]:
    """Those of them that take part in detection: loaded and not disabled."""
    return [info for info in installed_adapters() if info.adapter is not None and not info.disabled]


def _load_one(point: EntryPoint) -> Found:
    origin = _distribution(point)
    try:
        classes, factories = _contents(point.load())
    except Exception as failure:
        return Found((AdapterInfo(point.name, origin, None, f"{type(failure).__name__}: {failure}"),), ())
    observers = (ObserverInfo(name, origin, factory) for name, factory in factories.items())
    return Found(tuple(AdapterInfo(c.name, origin, c) for c in classes), tuple(observers))


def _contents(plugin: object) -> tuple[list[type[Adapter[Any]]], dict[str, ObserverFactory]]:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(_Spec)
    manager.register(plugin)
    manager.check_pending()
    classes = [cls for answer in manager.hook.tokentrim_adapters() for cls in answer]
    for cls in classes:
        _check_class(cls)
    factories: dict[str, ObserverFactory] = {}
    for answer in manager.hook.tokentrim_observers():
        _check_factories(answer)
        factories.update(answer)
    if not classes and not factories:
        raise PluginError(
            "the plugin provides no adapter and no observer: does it have a hookimpl named tokentrim_adapters or "
            "tokentrim_observers?"
        )
    return classes, factories


class _Spec:
    tokentrim_adapters = staticmethod(tokentrim_adapters)
    tokentrim_observers = staticmethod(tokentrim_observers)


def _check_factories(answer: Any) -> None:
    if not isinstance(answer, Mapping):
        raise PluginError(f"tokentrim_observers must return a mapping of names to factories, got {answer!r}")
    for name, factory in answer.items():
        if not (isinstance(name, str) and name) or not callable(factory):
            raise PluginError(f"tokentrim_observers must name factories, got {name!r}: {factory!r}")


def _check_class(cls: object) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise PluginError(f"tokentrim_adapters must return Adapter subclasses, got {cls!r}")
    if not getattr(cls, "name", ""):
        raise PluginError(f"adapter class {cls.__name__} has no name")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"adapter {cls.name!r} lacks {', '.join(missing)}")


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"


def _refuse_duplicates(infos: Sequence[AdapterInfo]) -> None:
    seen: dict[str, AdapterInfo] = {}
    for info in infos:
        if info.adapter is None:
            continue
        if info.name in seen:
            raise PluginError(
                f"two adapters are named {info.name!r}: one from {seen[info.name].distribution}, one from "
                f"{info.distribution}; uninstall one of them"
            )
        seen[info.name] = info


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
        broken = [f"{i.name} ({i.distribution}): {i.error}" for i in found().adapters if i.adapter is None]
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
