"""Which adapter takes a model: asks all, lets the more specific one win, and says in words why there is none."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokentrim_hooks.adapter import Adapter, Match
from tokentrim_hooks.errors import (
    AmbiguousModelError,
    CompiledModelError,
    PluginError,
    UnknownAdapterError,
    UnsupportedModelError,
)
from tokentrim_hooks.loading import asked, check_class
from tokentrim_hooks.plugins import AdapterInfo, left_out, no_such, not_used, usable_adapters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Detection:
    """What one adapter says of a model."""

    adapter: str
    distribution: str
    matches: bool
    reason: str
    near: float = 0.0
    """Of what does not match: how much of what the adapter looks for is there, 0 to 1."""


def ask_all(model: Any) -> list[tuple[Detection, Match | None]]:
    """What every usable adapter says of a model."""
    return [_ask(info, model) for info in usable_adapters()]


def _ask(info: AdapterInfo, model: Any) -> tuple[Detection, Match | None]:
    answer = asked(info.loaded, model)
    if isinstance(answer, Match):
        return Detection(info.name, info.distribution, True, answer.note or "recognised"), answer
    asked_for = f"{type(model).__module__}:{type(model).__qualname__}" in info.loaded.constructors
    near = (1.0 + answer.near) / 2 if asked_for else answer.near if _is_ours(info) else 1.0
    return Detection(info.name, info.distribution, False, answer.reason, near), None


def _is_ours(info: AdapterInfo) -> bool:
    return info.distribution.startswith("tokentrim-hooks ")


def choose(model: Any, name: str | type[Adapter[Any]] | None) -> tuple[type[Adapter[Any]], Match]:
    """The adapter for a model, or the one of that name or class.

    Raises:
        UnsupportedModelError, CompiledModelError: none recognises it. AmbiguousModelError: several do, none of them the
            more specific. UnknownAdapterError, PluginError: there is none of that name that can be used.
    """
    infos = usable_adapters() if name is None else [_given(name)]
    answers = [(info, *_ask(info, model)) for info in infos]
    hits = _most_specific([(info, match) for info, _, match in answers if match is not None])
    if len(hits) > 1:
        names = ", ".join(f"{info.name} ({info.distribution})" for info, _ in hits)
        raise AmbiguousModelError(
            f"several adapters recognise this model: {names}; choose with adapter='...'.\n"
            "An adapter of your own takes it from a built-in one that it names in instead_of, or derives from."
        )
    if not hits:
        _refuse_wrapped(model)
        raise UnsupportedModelError(_refusal(model, [found for _, found, _ in answers]))
    info, match = hits[0]
    if _wraps(getattr(match.denoiser, "owner", match.denoiser)):
        _refuse_wrapped(model)
    return info.loaded, match


def _most_specific(hits: list[tuple[AdapterInfo, Match]]) -> list[tuple[AdapterInfo, Match]]:
    """What is left when built-in adapters have given way to a third party's that says it is more specific."""
    others = [info for info, _ in hits if not _is_ours(info)]
    kept = [hit for hit in hits if hit[0] in others or not any(_goes_before(info, hit[0]) for info in others)]
    for info, _ in hits:
        if info not in [left for left, _ in kept]:
            winner = next(other for other in others if _goes_before(other, info))
            logger.info("%s leaves the model to %s, which is more specific", info.name, winner.name)
    return kept


def _goes_before(one: AdapterInfo, other: AdapterInfo) -> bool:
    return other.name in one.loaded.instead_of or issubclass(one.loaded, other.loaded)


def _given(adapter: str | type[Adapter[Any]]) -> AdapterInfo:
    """The adapter of a name, or one that was given as a class."""
    if isinstance(adapter, str):
        return _named(adapter)
    check_class(adapter)
    return AdapterInfo(adapter.name, "given as a class", adapter)


def _named(name: str) -> AdapterInfo:
    """The usable adapter of that name.

    Raises:
        UnknownAdapterError: there is none. PluginError: its plugin failed, or two distributions claim the name.
    """
    usable = {info.name: info for info in usable_adapters()}
    if name in usable:
        return usable[name]
    broken = [info for info in left_out() if info.name == name]
    if len(broken) > 1:
        origins = " and ".join(info.distribution for info in broken)
        raise PluginError(
            f"several plugins claim the name {name!r}, {origins}, so none of them is used.\n"
            "Uninstall all but one, or name the others' distributions in TOKENTRIM_DISABLE_ADAPTERS."
        )
    if broken:
        raise PluginError(
            f"plugin {name!r} ({broken[0].distribution}) cannot be used: {broken[0].error}.\nInstall a version that "
            "works, or uninstall it."
        )
    raise UnknownAdapterError(no_such("adapter", name, usable))


def _refuse_wrapped(model: Any) -> None:
    """Say so if the model, or a part of it, is inside a wrapper that hides its structure."""
    children = dict(model.named_children()) if isinstance(model, nn.Module) else getattr(model, "__dict__", {})
    for name, part in {"the model": model, **{f".{key}": value for key, value in children.items()}}.items():
        kind = type(part).__name__
        if hasattr(part, "_orig_mod"):
            raise CompiledModelError(
                f"{name} is a {kind}, made by torch.compile(module), which hides the model: patch it before it is "
                "compiled, or compile it in place with module.compile()"
            )
        if _wraps(part) or (_holds_module(part) and type(part).__module__.startswith("torch.")):
            raise UnsupportedModelError(
                f"{name} is wrapped in {kind}, which hides the model: patch what is inside, before it is wrapped"
            )


def _wraps(part: Any) -> bool:
    """Whether it is a wrapper that shows the attributes of the module inside, but not what its forward takes."""
    if not isinstance(part, nn.Module) or not _holds_module(part):
        return False
    _, *named = inspect.signature(type(part).forward).parameters.values()
    return all(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in named)


def _holds_module(part: Any) -> bool:
    return isinstance(getattr(part, "module", None), nn.Module)


def _refusal(model: Any, found: list[Detection]) -> str:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if not found:
        return (
            f"cannot patch {kind}: no adapter is installed or enabled; install this package with pip "
            "(adapters are found through entry points) and see `tokentrim adapters`"
        )
    if isinstance(model, type):
        return f"cannot patch the class {model.__qualname__}: it holds no model yet; make one of it, and patch that"
    first = min(found, key=lambda item: (-item.near, len(item.reason)))
    says = f"none of {len(found)} adapters finds in it what it looks for"
    if first.near or len(found) == 1:
        says = f"nearest adapter, {first.adapter}: {first.reason}"
    return (
        f"cannot patch {kind}; {says}.\n"
        f"See all reasons by tokentrim.detect(model), or add a model: docs/how-to/add-a-model.md{not_used()}."
    )
