"""What an adapter's methods answer, checked: one that returns the wrong kind of thing is told so, by name."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokentrim_hooks.adapter import Adapter, Call, Phase, Seen
from tokentrim_hooks.errors import PluginError
from tokentrim_hooks.pruning.context import CacheRows, Context, KeyLayout


def parsed(adapter: Adapter, arguments: Mapping[str, Any]) -> Call | None:
    """The call that :meth:`Adapter.parse` reads."""
    answer: Any = adapter.parse(arguments)
    if answer is not None and not isinstance(answer, Call):
        raise _wrong(adapter, "parse", answer, "a Call, or None for a call that is no rollout's")
    if answer is not None and (not isinstance(answer.latents, Tensor) or answer.latents.ndim != 5):
        latents: Any = answer.latents
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else latents
        raise _wrong(adapter, "parse", shape, "latents of shape [B, F, C, H, W]")
    return answer


def identity_of(adapter: Adapter, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What :meth:`Adapter.identity` says."""
    answer: Any = adapter.identity(arguments)
    if not isinstance(answer, tuple):
        raise _wrong(adapter, "identity", answer, "a tuple, as in (tensor,)")
    return answer


def context_of(adapter: Adapter, call: Call) -> Context:
    """Where :meth:`Adapter.context` says that the context lies."""
    answer: Any = adapter.context(call)
    if not isinstance(answer, (CacheRows, KeyLayout)):
        raise _wrong(adapter, "context", answer, "CacheRows or a KeyLayout; an empty context is one with no rows")
    return answer


def phase_of(adapter: Adapter, call: Call, seen: Seen) -> Phase:
    """What :meth:`Adapter.phase` takes the call for."""
    answer: Any = adapter.phase(call, seen)
    if not isinstance(answer, Phase):
        raise _wrong(adapter, "phase", answer, "a Phase")
    return answer


def prediction_of(adapter: Adapter, call: Call, output: Any) -> Tensor:
    """x0 of the newest chunk, by :meth:`Adapter.prediction`, of the shape of the call's latents."""
    answer: Any = adapter.prediction(call, output)
    if not isinstance(answer, Tensor):
        raise _wrong(adapter, "prediction", answer, "x0 as a tensor of the shape of call.latents")
    if answer.shape[:2] != call.latents.shape[:2] or answer.shape[3:] != call.latents.shape[3:]:
        raise _wrong(adapter, "prediction", tuple(answer.shape), f"x0 of shape {tuple(call.latents.shape)}")
    return answer


def _wrong(adapter: Adapter, method: str, answer: Any, expected: str) -> PluginError:
    shown = textwrap.shorten(repr(answer), 80, placeholder=" ...")
    return PluginError(f"adapter {adapter.name!r}: {method}() returned {shown}.\nIt must return {expected}.")
