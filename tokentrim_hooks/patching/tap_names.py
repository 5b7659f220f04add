"""How a tapped attention function is called, and under which names it takes query, key and value."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.errors import AttachError


@dataclass(frozen=True)
class TapNames:
    """Names under which an attention function takes query, key, value and mask; it refuses what ``refuse`` names.

    ``heads_first_out`` is for functions whose result, too, is ``[B, heads, length, head_dim]``; ``heads`` names the
    parameter with the number of heads, for functions that take ``[B, length, heads * head_dim]``. ``only(v)`` says
    which of its calls count, where others read something else than the context.
    """

    q: str = "q"
    k: str = "k"
    v: str = "v"
    mask: str | None = None
    refuse: tuple[str, ...] = ()
    heads_first: bool = False
    lengths: str | None = None
    heads: str | None = None
    heads_first_out: bool = False
    only: Callable[[Tensor], bool] | None = None

    def require_in(self, signature: inspect.Signature, label: str) -> None:
        """Raise AttachError unless a function takes what these names say (those in ``refuse`` may be missing)."""
        taken = signature.parameters
        places = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in taken.values())
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        if passes_on and (places < len("qkv") or {self.q, self.k, self.v} & taken.keys()):
            return
        named = {name: getattr(self, name) for name in ("q", "k", "v", "mask", "lengths", "heads")}
        missing = [f"{option}={name!r}" for option, name in named.items() if name is not None and name not in taken]
        if missing:
            raise AttachError(
                f"{label}() takes ({', '.join(taken)}) and so cannot be tapped with {', '.join(missing)}.\n"
                "Give patches.tap the names of its own parameters: q=, k=, v=, mask=, lengths=, heads=."
            )

    def turns(self, given: Given) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """From the form in which the function takes q, k and v to ``[B, length, heads, head_dim]``, and back."""
        if self.heads_first:
            return _swap_heads, _swap_heads
        if self.heads is None:
            return _same, _same
        heads = int(given[self.heads])
        return (lambda x: x.unflatten(-1, (heads, -1))), (lambda x: x.flatten(-2))


def places_of(signature: inspect.Signature) -> dict[str, int]:
    """Where a function takes arguments that are given without their names."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: place for place, (name, p) in enumerate(signature.parameters.items()) if p.kind in kinds}


class Given:
    """Arguments of a call by name. ``inspect.Signature.bind`` takes ten times as long, in every attention call.

    Args:
        places: of the function. args, kwargs: of the call; the latter are written.
    """

    def __init__(self, places: Mapping[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._places = places
        self.args, self.kwargs = list(args), kwargs

    def __getitem__(self, name: str) -> Any:
        """An argument that has to be there; TypeError where it is not."""
        if name in self.kwargs:
            return self.kwargs[name]
        if not self._places.get(name, len(self.args)) < len(self.args):
            raise TypeError(f"attention is called without its argument {name!r}: give it")
        return self.args[self._places[name]]

    def get(self, name: str | None) -> Any:
        """An argument, or None where it is left out."""
        if name is None or name in self.kwargs or self._places.get(name, len(self.args)) >= len(self.args):
            return None if name is None else self.kwargs.get(name)
        return self.args[self._places[name]]

    def __setitem__(self, name: str, value: Any) -> None:
        """Give another one in its place, or by its name where it was left out."""
        if name in self.kwargs or self._places.get(name, len(self.args)) >= len(self.args):
            self.kwargs[name] = value
        else:
            self.args[self._places[name]] = value


def _swap_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _same(x: Tensor) -> Tensor:
    return x


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """How torch's own kernel is called: Python finds no signature of what is written in C."""


BUILTINS = {
    torch.nn.functional.scaled_dot_product_attention: (
        inspect.signature(_sdpa),
        TapNames("query", "key", "value", "attn_mask", ("is_causal",), heads_first=True, heads_first_out=True),
    )
}
"""Signatures and names of attention functions that are written in C."""


def described(function: Any, names: TapNames, label: str) -> tuple[inspect.Signature, TapNames]:
    """How a function is called and under which names; what we know of torch's own needs no names from the adapter."""
    try:
        known = BUILTINS.get(function)
    except TypeError:  # it cannot be hashed
        known = None
    if known is not None:
        signature, own = known
        names = own if names.q == "q" else dataclasses.replace(names, heads_first=True, heads_first_out=True)
    else:
        signature = _signature_of(function, label)
    names.require_in(signature, label)
    return signature, names


def _signature_of(function: Any, label: str) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise AttachError(
            f"{label} does not say how it is called: it is no function of Python.\n"
            "Tap a function of the model around it, or the forward of the attention module."
        ) from None


def label_of(namespace: Any) -> str:
    """What a message calls the place of a function."""
    return "a dict" if isinstance(namespace, dict) else str(getattr(namespace, "__name__", type(namespace).__name__))
