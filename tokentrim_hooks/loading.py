"""Loading one plugin: its code is somebody else's, so whatever it raises, or says wrongly, is its own failure."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, EntryPoints, distributions
from typing import Any

import pluggy
from torch import nn

from tokentrim_hooks.adapter import Adapter, Match, NoMatch
from tokentrim_hooks.errors import PluginError
from tokentrim_hooks.extras import lacking
from tokentrim_hooks.markers import GROUP, hookspec
from tokentrim_hooks.patching.patches import Method
from tokentrim_hooks.policy.base import Policy, hooks_of
from tokentrim_hooks.report.observers import ObserverFactory

FAILURES = (Exception, SystemExit)
"""What a plugin may raise without ending the user's program. Ctrl-C is the user's word, and goes on up."""
UNKNOWN = "unknown distribution"


@hookspec
def tokentrim_adapters() -> Sequence[type[Adapter[Any]]]:  # type: ignore[empty-body]
    """Return the adapter classes that this plugin provides."""


@hookspec
def tokentrim_observers() -> Mapping[str, ObserverFactory]:  # type: ignore[empty-body]
    """Return the observers that this plugin provides, by name: none observes until a user asks for it.

    A factory is called once per patched model, imports its library, and opens no file before ``on_start``. Its
    ``needs``, where it has any, map modules to the names that pip knows: what lacks is told before a run begins.
    """


@hookspec
def tokentrim_policies() -> Mapping[str, type[Policy]]:  # type: ignore[empty-body]
    """Return the policies that this plugin provides, by name: none is used until a user asks for it."""


@dataclass(frozen=True)
class AdapterInfo:
    """An installed adapter, or why there is none: a plugin that failed or was not loaded (``adapter`` is None).

    Attributes:
        name: the adapter's, or that of the entry point where nothing was loaded.
        distribution: name and version of what was installed. error: why it cannot be used.
        disabled: by ``TOKENTRIM_DISABLE_ADAPTERS``. shadowed: somebody else has its name too.
    """

    name: str
    distribution: str
    adapter: type[Adapter[Any]] | None = None
    error: str = ""
    disabled: bool = False
    shadowed: bool = False

    @property
    def loaded(self) -> type[Adapter[Any]]:
        """The adapter's class.

        Raises:
            PluginError: the plugin failed to load, was not loaded, or does not own the name.
        """
        if self.adapter is None:
            state = "is not used" if self.shadowed or self.disabled else "failed to load"
            raise PluginError(f"plugin {self.name!r} ({self.distribution}) {state}: {self.error}")
        return self.adapter


@dataclass(frozen=True)
class ObserverInfo:
    """An observer that can be asked for by name, unless ``error`` says why not."""

    name: str
    distribution: str
    factory: ObserverFactory
    error: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """What is not installed of its factory's ``needs``, by the names that pip knows."""
        return lacking(getattr(self.factory, "needs", {}))


@dataclass(frozen=True)
class PolicyInfo:
    """A policy that can be asked for by name, unless ``error`` says why not.

    Attributes:
        name: as in ``tokentrim run --policy``. distribution: name and version of what was installed.
        policy: the class; its fields are its options.
    """

    name: str
    distribution: str
    policy: type[Policy]
    error: str = ""

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that it overrides."""
        return hooks_of(self.policy)

    @property
    def summary(self) -> str:
        """The first line of its docstring, without marks of a documentation tool."""
        return re.sub(r":\w+:`~?(.+?)`", r"\1", (self.policy.__doc__ or "").strip().partition("\n")[0])


@dataclass(frozen=True)
class Found:
    """What plugins provide; those that failed to load stand among the adapters, with their error."""

    adapters: tuple[AdapterInfo, ...] = ()
    observers: tuple[ObserverInfo, ...] = ()
    policies: tuple[PolicyInfo, ...] = ()


@dataclass
class Contents:
    """What the hooks of one plugin return, checked: adapters, and observers and policies by name."""

    adapters: list[type[Adapter[Any]]]
    observers: dict[str, ObserverFactory] = field(default_factory=dict)
    policies: dict[str, type[Policy]] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """An entry point with its distribution; one that cannot be read has ``error`` instead of ``entry``."""

    name: str
    distribution: str
    entry: EntryPoint | None = None
    error: str = ""


def why(failure: BaseException) -> str:
    """A failure in words: its kind and its message, at most a few lines of it."""
    try:
        message = textwrap.shorten(str(failure), 300, placeholder=" ...")
    except FAILURES:
        message = "(its message cannot be shown)"
    return f"{type(failure).__name__}: {message}" if message else type(failure).__name__


def plain(name: str) -> str:
    """A name as package indexes compare them: lower case, one hyphen for any run of ``-``, ``_`` and dots."""
    return re.sub(r"[-_.]+", "-", name).lower()


def project_of(distribution: str) -> str:
    """The name in ``name version``."""
    return distribution.partition(" ")[0]


def installed_points() -> list[Point]:
    """The entry points of our group, in a fixed order; a distribution whose file is broken harms no other."""
    points: dict[str, list[Point]] = {}
    for found in distributions():
        origin = _origin(found)
        if origin == UNKNOWN:
            points.setdefault(UNKNOWN, []).extend(_points_of(found, origin))
        else:
            points.setdefault(plain(project_of(origin)), _points_of(found, origin))
    return sorted((p for some in points.values() for p in some), key=lambda p: (p.distribution, p.name))


def _points_of(found: Distribution, origin: str) -> list[Point]:
    try:
        if GROUP not in (found.read_text("entry_points.txt") or ""):
            return []
        entries: EntryPoints = found.entry_points
        return [Point(entry.name, origin, entry) for entry in entries if entry.group == GROUP]
    except FAILURES as failure:
        return [Point("entry_points.txt", origin, error=f"it cannot be read: {why(failure)}")]


def _origin(found: Distribution) -> str:
    try:
        name, version = found.metadata["Name"], found.version
    except FAILURES:
        return UNKNOWN
    return f"{name} {version}" if name else UNKNOWN


def load(point: Point) -> Found:
    """What one plugin provides; where it fails, an :class:`AdapterInfo` that says why."""
    try:
        if point.entry is None:
            raise PluginError(point.error)
        parts = contents(point.entry.load())
    except FAILURES as failure:
        return Found((AdapterInfo(point.name, point.distribution, None, why(failure)),))
    return Found(
        tuple(AdapterInfo(adapter.name, point.distribution, adapter) for adapter in parts.adapters),
        tuple(ObserverInfo(name, point.distribution, factory) for name, factory in parts.observers.items()),
        tuple(PolicyInfo(name, point.distribution, policy) for name, policy in parts.policies.items()),
    )


def contents(plugin: object) -> Contents:
    """What a plugin's hooks return, checked.

    Raises:
        PluginError: they break the hook's contract. Anything else: the plugin's own failure.
    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(sys.modules[__name__])
    manager.register(plugin)
    manager.check_pending()
    found = Contents([cls for answer in manager.hook.tokentrim_adapters() for cls in _listed(answer)])
    for cls in found.adapters:
        check_class(cls)
    for answer in manager.hook.tokentrim_observers():
        _check_factories(answer)
        found.observers.update(answer)
    for answer in manager.hook.tokentrim_policies():
        _check_policies(answer)
        found.policies.update(answer)
    if not (found.adapters or found.observers or found.policies):
        words = "the plugin provides no adapter, no observer and no policy: give it a hookimpl named "
        raise PluginError(f"{words}tokentrim_adapters, tokentrim_observers or tokentrim_policies")
    return found


def _listed(answer: Any) -> Sequence[Any]:
    if not isinstance(answer, (list, tuple)):
        raise PluginError(f"tokentrim_adapters must return a list of Adapter subclasses, got {answer!r}")
    return answer


def _check_factories(answer: Any) -> None:
    if not isinstance(answer, Mapping):
        raise PluginError(f"tokentrim_observers must return a mapping of names to factories, got {answer!r}")
    for name, factory in answer.items():
        if not (isinstance(name, str) and name) or not callable(factory):
            raise PluginError(f"tokentrim_observers must name factories, got {name!r}: {factory!r}")


def _check_policies(answer: Any) -> None:
    if not isinstance(answer, Mapping):
        raise PluginError(f"tokentrim_policies must return a mapping of names to Policy subclasses, got {answer!r}")
    for name, policy in answer.items():
        if not (isinstance(name, str) and name.strip()):
            raise PluginError(f"tokentrim_policies must name policies by strings, got {name!r}")
        if not (isinstance(policy, type) and issubclass(policy, Policy) and hooks_of(policy)):
            raise PluginError(f"policy {name!r} must be a subclass of Policy that overrides a hook, got {policy!r}")


def check_class(cls: object) -> None:
    """Raise PluginError unless ``cls`` can be used as an adapter."""
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise PluginError(f"an adapter must be one of the Adapter subclasses, got {cls!r}")
    name: object = getattr(cls, "name", "")
    if not (isinstance(name, str) and name.strip()):
        raise PluginError(f"adapter class {cls.__name__} has no name; give it one")
    if hasattr(cls, "reference"):
        raise PluginError(f"adapter {name!r} has a method reference(), which is called in_flight() now: rename it")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"adapter {name!r} lacks {', '.join(missing)}; write what is missing")
    for member in ("models", "constructors", "instead_of"):
        value: object = getattr(cls, member)
        if not (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)):
            raise PluginError(f"{member} of adapter {name!r} must be a tuple of strings, got {value!r}")
    if wrong := [place for place in cls.constructors if not re.fullmatch(r"[\w.]+:\w+", place)]:
        raise PluginError(f"constructors of adapter {name!r} must read package.module:Class, got {wrong[0]!r}")


def asked(adapter: type[Adapter[Any]], model: Any) -> Match | NoMatch:
    """What an adapter's ``probe`` says of a model; its failure, or an answer that is none, is a refusal."""
    try:
        answer: Any = adapter.probe(model)
        if isinstance(answer, Match):
            return NoMatch(f"its probe returned a Match whose {wrong}") if (wrong := _wrong_in(answer)) else answer
        if isinstance(answer, NoMatch):
            return NoMatch(str(answer.reason), float(answer.near))
        return NoMatch(f"its probe returned {textwrap.shorten(repr(answer), 80)}, which is neither Match nor NoMatch")
    except FAILURES as failure:
        return NoMatch(f"its probe failed with {why(failure)}")


def _wrong_in(match: Match) -> str:
    """What is wrong with a match, in words; nothing if it can be used."""
    size: Any = match.patch_size
    if not all(isinstance(part, (nn.Module, Method)) for part in (match.denoiser, *match.also)):
        return "denoiser is no module"
    if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        return f"patch_size is {size!r}, not (height, width)"
    return ""
