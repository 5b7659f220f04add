"""What an adapter's methods answer, checked: one that returns the wrong kind of thing is told so, by name."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tokentrim_hooks.adapter import Adapter, Call, Phase, Seen
from tokentrim_hooks.errors import LatentsError, PluginError, PolicyError
from tokentrim_hooks.pruning.context import CacheRows, Context, KeyLayout, Segment

LASTING = "a tensor of the cache (lists and dicts are made anew at any call), an object or a number"
"""What tells videos, or contexts, apart."""
_CONTAINERS = (list, dict, set)


def parsed(adapter: Adapter, arguments: Mapping[str, Any]) -> Call | None:
    """The call that :meth:`Adapter.parse` reads."""
    answer: Any = adapter.parse(arguments)
    if answer is not None and not isinstance(answer, Call):
        raise _wrong(adapter, "parse", answer, "a Call, or None for a call that is no rollout's")
    if answer is not None and isinstance(answer.latents, Tensor) and answer.latents.shape[:1] == (0,):
        raise LatentsError("the denoiser was called with a batch of 0: there is nothing to judge; leave such calls out")
    if answer is not None and (fault := _call_fault(answer)):
        raise _wrong(adapter, "parse", *fault)
    return answer


def _call_fault(call: Any) -> tuple[Any, str] | None:
    """What is wrong with a call, and what is expected; None if it can be used."""
    latents = call.latents
    if not isinstance(latents, Tensor) or latents.ndim != 5 or not latents.numel():
        return _shape(latents), "latents of shape [B, F, C, H, W]"
    if type(call.start) is not int and not isinstance(call.start, Integral):
        return f"start={call.start!r}", "start as an int, counted on the host (to read a tensor is to wait for it)"
    if not (call.timestep is None or isinstance(call.timestep, Tensor)):
        return f"timestep={call.timestep!r}", "timestep as a tensor, or None"
    if isinstance(call.stream, _CONTAINERS):
        return f"stream of type {type(call.stream).__name__}", f"{LASTING} as stream; leave it out if there is one"
    if isinstance(call.commits, Tensor):
        return f"commits={call.commits!r}", "commits as True, False or None: a tensor would have to be read"
    return None


def identity_of(adapter: Adapter, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What :meth:`Adapter.identity` says."""
    answer: Any = adapter.identity(arguments)
    if not isinstance(answer, tuple):
        raise _wrong(adapter, "identity", answer, "a tuple, as in (tensor,)")
    for part in answer:
        if isinstance(part, _CONTAINERS):
            raise _wrong(adapter, "identity", "a list or dict", f"{LASTING} in its tuple")
    return answer


def context_of(adapter: Adapter, call: Call) -> Context:
    """Where :meth:`Adapter.context` says that the context lies."""
    answer: Any = adapter.context(call)
    if not isinstance(answer, (CacheRows, KeyLayout)):
        raise _wrong(adapter, "context", answer, "CacheRows or a KeyLayout; an empty context is one with no rows")
    if fault := _rows_fault(answer) if isinstance(answer, CacheRows) else _layout_fault(answer):
        raise _wrong(adapter, "context", *fault)
    return answer


def _layout_fault(layout: KeyLayout) -> tuple[str, str] | None:
    """What is wrong with the keys of a sequence, and what is expected; None if nothing is."""
    segments: Any = layout.segments
    if not isinstance(segments, (tuple, list)) or not all(isinstance(segment, Segment) for segment in segments):
        return f"segments={segments!r}", "segments as a tuple of Segment"
    if not segments:
        return "a KeyLayout of no segments", "a segment for all keys, the chunk's own (Role.CURRENT) among them"
    return None


def _rows_fault(rows: CacheRows) -> tuple[str, str] | None:
    """What is wrong with the rows of a cache, and what is expected; None if nothing is."""
    values: Any = rows.values
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        return f"values of type {type(values).__name__}", "values as a list of the V tensors, one per layer"
    bounds = {name: getattr(rows, name) for name in ("start", "stop", "rows_per_frame", "anchors")}
    said = ", ".join(f"{name}={value!r}" for name, value in bounds.items())
    if not all(isinstance(value, Integral) for value in bounds.values()):
        return said, "ints counted on the host"
    if not (0 <= rows.start <= rows.stop and rows.anchors >= 0):
        return said, "0 <= start <= stop, and no negative anchors"
    if not values and rows.stop > rows.start:
        return f"values=[] with history in rows {rows.start} to {rows.stop}", "the V tensor of every layer"
    if len(rows.keys) not in (0, len(values)):
        return f"{len(rows.keys)} keys beside {len(values)} values", "as many keys as values, or none"
    return next((fault for value in values if (fault := _value_fault(value, rows))), None)


def _value_fault(value: Any, rows: CacheRows) -> tuple[str, str] | None:
    """The same for the V of one layer. What is quantised is refused in other words, at the first prune."""
    if isinstance(value, (Mapping, list, tuple)):
        return f"values that hold a {type(value).__name__}", "values as a list of the V tensors themselves"
    if not isinstance(value, Tensor):
        return None
    if value.ndim not in (4, 5):
        shapes = "[B, rows, heads, head_dim] or [B, frames, rows_per_frame, heads, head_dim]"
        return f"values of shape {tuple(value.shape)}", f"values of shape {shapes}"
    there = math.prod(value.shape[1:-2])
    if rows.stop <= there:
        return None
    shown = f"stop={rows.stop} for values of {there} rows, {tuple(value.shape)}"
    return shown, "values [B, rows, heads, head_dim], views with transpose(1, 2) if heads come first, and stop within"


def phase_of(adapter: Adapter, call: Call, seen: Seen) -> Phase:
    """What :meth:`Adapter.phase` takes the call for."""
    answer: Any = adapter.phase(call, seen)
    if not isinstance(answer, Phase):
        raise _wrong(adapter, "phase", answer, "a Phase")
    return answer


def restarts_of(adapter: Adapter, call: Call, seen: Seen) -> bool:
    """Whether the call begins a new video, by :meth:`Adapter.restarts`."""
    answer: Any = adapter.restarts(call, seen)
    if not isinstance(answer, bool):
        raise _wrong(adapter, "restarts", answer, "True or False, told on the host")
    return answer


def replayed(adapter: Adapter, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the denoiser returns, called again by :meth:`Adapter.replay`."""
    answer: Any = adapter.replay(denoiser, args, kwargs)
    if answer is None:
        raise _wrong(adapter, "replay", answer, "what the denoiser returned")
    return answer


def prediction_of(adapter: Adapter, call: Call, output: Any) -> Tensor:
    """x0 of the newest chunk, by :meth:`Adapter.prediction`, of the shape of the call's latents."""
    answer: Any = adapter.prediction(call, output)
    if not isinstance(answer, Tensor):
        raise _wrong(adapter, "prediction", answer, "x0 as a tensor of the shape of call.latents")
    if answer.shape[:2] != call.latents.shape[:2] or answer.shape[3:] != call.latents.shape[3:]:
        raise _wrong(adapter, "prediction", tuple(answer.shape), f"x0 of shape {tuple(call.latents.shape)}")
    return answer


def in_flight_of(adapter: Adapter, call: Call, output: Any) -> Tensor | None:
    """x0 of the chunk before, by :meth:`Adapter.in_flight`, where that is still being denoised."""
    return _chunk_of(adapter, "in_flight", adapter.in_flight(call, output), call)


def accepted_of(adapter: Adapter, call: Call) -> Tensor | None:
    """The chunk before as it was accepted, by :meth:`Adapter.accepted`."""
    return _chunk_of(adapter, "accepted", adapter.accepted(call), call)


def _chunk_of(adapter: Adapter, method: str, answer: Any, call: Call) -> Tensor | None:
    if answer is None:
        return None
    fits = isinstance(answer, Tensor) and answer.ndim == 5
    if not fits or answer.shape[0] != call.latents.shape[0] or answer.shape[2:] != call.latents.shape[2:]:
        raise _wrong(adapter, method, _shape(answer), f"a chunk like call.latents {tuple(call.latents.shape)}, or None")
    chunk: Tensor = answer
    return chunk


def carried(adapter: Adapter, call: Call, earlier: Call, moved: Call, before: Tensor, after: Tensor) -> Tensor:
    """Latents of ``call`` after another step before it, by :meth:`Adapter.carry_step`."""
    answer: Any = adapter.carry_step(call, earlier, moved, before, after)
    if not isinstance(answer, Tensor) or answer.shape != call.latents.shape:
        method = "carry" if type(adapter).carry_step is Adapter.carry_step else "carry_step"
        raise _wrong(adapter, method, _shape(answer), f"latents of shape {tuple(call.latents.shape)}")
    return answer


def moved_arguments(
    adapter: Adapter, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with other latents, by :meth:`Adapter.with_latents`."""
    answer: Any = adapter.with_latents(call, args, kwargs, latents)
    if not (isinstance(answer, tuple) and [type(part) for part in answer] == [tuple, dict]):
        raise _wrong(adapter, "with_latents", answer, "a pair: the positional arguments (a tuple), the others (a dict)")
    return answer


@contextlib.contextmanager
def unwritten(policy: object, hook: str, *tensors: Tensor) -> Iterator[None]:
    """While a policy is asked: what it is shown is the model's own, so it must not be written into.

    Told by torch's count of writes, which costs nothing, and which tensors of inference mode do not have.

    Raises:
        PolicyError: it was.
    """
    counted = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
    yield
    if any(tensor._version != before for tensor, before in counted):
        raise PolicyError(
            f"{type(policy).__name__}.{hook} has written into what it was shown, which is the model's own.\n"
            "Let it work on a copy (tensor.clone()), and return what shall be different."
        )


def shown(tensor: Tensor) -> Tensor:
    """What a policy is shown of a tensor: a copy where a write into it could not be noticed."""
    return tensor.clone() if tensor.is_inference() else tensor


def _shape(answer: Any) -> Any:
    return tuple(answer.shape) if isinstance(answer, Tensor) else answer


def _wrong(adapter: Adapter, method: str, answer: Any, expected: str) -> PluginError:
    shown = textwrap.shorten(answer if isinstance(answer, str) else repr(answer), 80, placeholder=" ...")
    return PluginError(f"adapter {adapter.name!r}: {method}() returned {shown}.\nIt must return {expected}.")


def select(prune: list[bool], again: Any, output: Any) -> Any:
    """Take flagged samples from ``again``, the others from ``output``; both have B first in every tensor."""
    if all(prune):
        return again

    def choose(new: Any, old: Any) -> Any:
        if not isinstance(new, Tensor) or new.ndim == 0 or new.shape[0] != len(prune):
            return new
        chosen = torch.tensor(prune, device=new.device).view(-1, *[1] * (new.ndim - 1))
        return torch.where(chosen, new, old)

    return tree_map(choose, again, output)
