"""Look into a model that somebody else wrote: its layers, its modules' globals, its signatures, its noise schedule.

Adapters recognise models with these, and so say in the same words why one is not theirs. Nothing here changes a model.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

P = ParamSpec("P")
T = TypeVar("T")


def layers_of(model: object, blocks: str, name: str) -> list[Any]:
    """The modules ``name`` of a model's blocks, in order; blocks that have none are left out.

    ``blocks`` is a path, as in ``layers_of(generator, "model.blocks", "self_attn")``: one self attention per block.
    """
    found: Any = functools.reduce(lambda owner, part: getattr(owner, part, None), blocks.split("."), model)
    layers = (getattr(block, name, None) for block in found or ())
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def home_of(thing: object, function: str = "") -> Any:
    """The Python module whose globals the code of ``thing`` sees: an object's, a class's, a function's.

    It is where a module-level attention function is to be tapped. None if there is no such module, or if it has no
    ``function`` of that name.
    """
    home = sys.modules.get(getattr(thing, "__module__", None) or "")
    return home if not function or callable(getattr(home, function, None)) else None


def parameters_of(function: object) -> tuple[str, ...]:
    """Names of the parameters of a function, or of a module's forward, in order; none for what cannot be called.

    Of a module those that its class declares: libraries put wrappers on the instance whose own signature says nothing
    (``*args, **kwargs``) or too little.
    """
    return tuple(_signature_of(function).parameters) if callable(function) else ()


def defaults_of(function: object) -> dict[str, Any]:
    """Parameters as in :func:`parameters_of` that may be left out, and what they are then."""
    taken = _signature_of(function).parameters.items() if callable(function) else ()
    return {name: parameter.default for name, parameter in taken if parameter.default is not parameter.empty}


def lacks(function: object, names: Iterable[str], label: str) -> str:
    """Why a function or module (``label`` in words) is not the one looked for: it does not take all of ``names``.

    Returns:
        The reason for a :class:`NoMatch`, as in "the generator's forward lacks kv_cache"; empty if it takes them all.
    """
    taken = parameters_of(function)
    missing = [name for name in names if name not in taken]
    return f"{label} lacks {', '.join(missing)}" if missing else ""


def nearest_sigma(scheduler: Any, timestep: Tensor) -> Tensor:
    """Noise level of every timestep: that of the nearest one in the scheduler's ``timesteps`` and ``sigmas``.

    Timesteps may have been rounded on their way, so the table knows better. Read on the device of ``timestep``; the
    shape is that of ``timestep``, the type that of the table.
    """
    table: Tensor = scheduler.timesteps.to(timestep.device)
    nearest = (table[:, None] - timestep.flatten()[None]).abs().argmin(0)
    sigma: Tensor = scheduler.sigmas.to(timestep.device)[nearest]
    return sigma.view(timestep.shape)


def x0_of_flow(flow: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """Clean latents of a model that predicts flow: ``latents - sigma flow``, computed in float64, in the type of flow.

    Args:
        flow, latents: ``[B, F, C, H, W]``. sigma: noise levels, 0 clean to 1 noise: ``[B]``, ``[B, 1]`` or ``[B, F]``.
    """
    spread = sigma.view(*sigma.shape, *[1] * (5 - sigma.ndim)).double()
    # What is narrower is widened on the way into the kernel, which is two operations less.
    return (latents - spread * flow).to(flow.dtype)


def shares_storage(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors look at the same memory (a sampler hands back what it was given)."""
    if a is None or b is None or a.device != b.device or a.numel() == 0:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def compiled_part(owner: object) -> str:
    """Class and name of the first part of a module that was compiled with ``torch.compile``; empty if none was."""
    for name, part in owner.named_modules() if isinstance(owner, nn.Module) else ():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            return f"{type(part).__name__} {name or '(the denoiser)'}"
    return ""


def weakly(thing: Any) -> Callable[[], Any]:
    """A way to ``thing`` that does not keep it alive, where it can be referred to so; None once it is gone."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def holds(owner: object, part: object) -> bool:
    """Whether ``part`` is an attribute or submodule of ``owner``, or in a list, tuple or dict that is one."""
    attributes = getattr(owner, "__dict__", {})
    for value in (*attributes.values(), *(attributes.get("_modules") or {}).values()):
        inside = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
        if value is part or any(item is part for item in inside):
            return True
    return False


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``function(*args, **kwargs)`` by name, defaults included; of a method also ``self``."""
    owner = {"self": function.__self__} if inspect.ismethod(function) else {}
    return {**owner, **_parameters_of(function).bind(args, kwargs)}


class Binder:
    """:func:`bind` for calls of the same few denoisers, whose signature is looked for once."""

    def __init__(self) -> None:
        self._forward: Any = None
        self._parameters: _Parameters | None = None

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        forward = type(function).forward if isinstance(function, nn.Module) else None
        if forward is None or self._parameters is None or forward is not self._forward:
            if forward is None or forward is nn.Module.forward:
                return bind(function, args, kwargs)
            self._forward, self._parameters = forward, _parameters_of(function)
        return self._parameters.bind(args, kwargs)


class _Parameters:
    """A signature that was looked at once: inspecting costs more than the rest of our work on a denoiser call."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature
        taken = signature.parameters.values()
        self._names = tuple(p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD)
        self._plain = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in taken)
        self._unset = {p.name: p.default for p in taken}
        self._required = {p.name for p in taken if p.default is p.empty}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, in the order of the parameters; what does not fit is Python's to refuse."""
        given = dict(zip(self._names, args, strict=False))
        fits = self._plain and len(args) <= len(self._names) and given.keys().isdisjoint(kwargs)
        given.update(kwargs)
        if not (fits and self._required <= given.keys() <= self._unset.keys()):
            return self._bind_slowly(args, kwargs)
        return {**self._unset, **given}

    def _bind_slowly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


_signatures: weakref.WeakKeyDictionary[Any, _Parameters] = weakref.WeakKeyDictionary()


def _signature_of(function: Any) -> inspect.Signature:
    return _parameters_of(function).signature


def _parameters_of(function: Any) -> _Parameters:
    """What ``function`` takes; defaults are kept, which a function keeps anyway, but nothing that holds the model."""
    function = _declared(function)
    # Not the bound method, which is a new object each time.
    key = getattr(function, "__func__", function)
    found = _signatures.get(key)
    if found is None:
        found = _signatures[key] = _Parameters(inspect.signature(function))
    return found


def _declared(function: Any) -> Any:
    """What says how ``function`` is called: of a module its class's forward, whatever hangs on the instance.

    A module whose class declares none (a bare ``nn.Module`` with a forward of its own) is read by that one.
    """
    if not isinstance(function, nn.Module):
        return function
    declared: Any = next((vars(kind)["forward"] for kind in type(function).__mro__ if _names_what_it_takes(kind)), None)
    return function.forward if declared is None else types.MethodType(declared, function)


def _names_what_it_takes(kind: type) -> bool:
    """Whether a class declares a forward that says more than ``(self, *args, **kwargs)``, as one of a subclass may.

    One that says no more and calls no other ``forward`` hands on to something else, which its adapter knows.
    """
    forward = vars(kind).get("forward")
    if forward is None or kind is nn.Module:
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or "__signature__" in getattr(forward, "__dict__", ()):
        return True
    taken = code.co_argcount + code.co_kwonlyargcount
    passes_on = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS) and "forward" in code.co_names
    return taken > 1 or not passes_on


def profiled(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns, called as a named stretch of a profile; just called while no profiler is on."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return function(*args, **kwargs)
    with record_function(name):
        return function(*args, **kwargs)
