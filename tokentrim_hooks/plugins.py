"""Finding adapters: built-in and third-party ones come through the same entry points."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import pluggy

from tokentrim_hooks.adapter import Adapter
from tokentrim_hooks.errors import PluginError

GROUP = "tokentrim_hooks"
DISABLE = "TOKENTRIM_DISABLE_ADAPTERS"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def tokentrim_adapters() -> Sequence[type[Adapter]]:  # type: ignore[empty-body]
    """Return the adapter classes that this plugin provides."""


@dataclass(frozen=True)
class AdapterInfo:
    """An installed adapter, or a plugin that failed to load (then ``adapter`` is None and ``error`` says why)."""

    name: str
    distribution: str
    adapter: type[Adapter] | None = None
    error: str = ""
    disabled: bool = False


def load(points: Sequence[EntryPoint]) -> list[AdapterInfo]:
    """Load plugins in a fixed order, each in its own try; raise PluginError only for two adapters of one name."""
    infos: list[AdapterInfo] = []
    for point in sorted(points, key=lambda p: (_distribution(p), p.name)):
        infos.extend(_load_one(point))
    _refuse_duplicates(infos)
    return sorted(infos, key=lambda info: (info.adapter is None, info.name))


@functools.cache
def installed() -> tuple[AdapterInfo, ...]:
    """All installed adapters, loaded once per process."""
    return tuple(load(list(entry_points(group=GROUP))))


def enabled() -> list[AdapterInfo]:
    """Adapters that take part in detection: loaded, and not named in ``TOKENTRIM_DISABLE_ADAPTERS``."""
    return [info for info in everything() if info.adapter is not None and not info.disabled]


def everything() -> list[AdapterInfo]:
    """All installed adapters, the disabled ones marked; ``TOKENTRIM_DISABLE_ADAPTERS=name,name`` is read each time."""
    off = {name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    return [
        AdapterInfo(i.name, i.distribution, i.adapter, i.error, disabled=i.name in off) for i in installed()
    ]


def _load_one(point: EntryPoint) -> list[AdapterInfo]:
    try:
        return [AdapterInfo(c.name, _distribution(point), c) for c in _adapters_of(point.load())]
    except Exception as failure:
        return [AdapterInfo(point.name, _distribution(point), None, f"{type(failure).__name__}: {failure}")]


def _adapters_of(plugin: object) -> list[type[Adapter]]:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(_Spec)
    manager.register(plugin)
    manager.check_pending()
    classes = [cls for answer in manager.hook.tokentrim_adapters() for cls in answer]
    if not classes:
        raise PluginError("the plugin provides no adapter: does it have a hookimpl named tokentrim_adapters?")
    for cls in classes:
        _check_class(cls)
    return classes


class _Spec:
    tokentrim_adapters = staticmethod(tokentrim_adapters)


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
