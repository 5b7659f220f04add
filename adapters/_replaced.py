"""Forwards that somebody else has put in the place of a module's own."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def replaced_forward(module: nn.Module, cache: str = "kv_cache") -> str:
    """By what function a module's forward was replaced that deals with the cache itself; empty if it was not.

    On the object, as forks do that install themselves into a model, or on its class. A wrapper that hands on whatever
    it is given is none, nor is one that says what it wraps, if that is the module's own.

    Args:
        module: the module. cache: the parameter by which a forward is given the cache.
    """
    forward: Any = inspect.unwrap(module.forward)
    function = getattr(forward, "__func__", forward)
    name = str(getattr(function, "__qualname__", ""))
    own = any(name.endswith(f"{kind.__name__}.forward") for kind in type(module).__mro__)
    if own or not inspect.isfunction(function) or cache not in inspect.signature(function).parameters:
        return ""
    return f"{function.__module__}.{name}"
