"""Optional parameters of forks: harmless while every call leaves them alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SWITCHES = ("clip_fea", "y", "discriminator_features", "return_features", "features_only", "feature_layers")
"""What forks take besides for images and for training; left at their defaults they change nothing."""

CONTEXT = ("cache", "kv", "mem", "bank", "sink", "window", "rope", "histor", "context", "retriev")
"""In the name of a parameter: it is about the context, so what follows when it is left alone is not known."""


def is_off(name: str, default: Any) -> bool:
    """Whether a parameter is off by default (None, False, or empty), and not about the context by its name."""
    off = default is None or default is False or default in ((), "")
    return off and not any(word in name for word in CONTEXT)


def same(given: Any, default: Any) -> bool:
    """Whether a call leaves a parameter alone."""
    return given is default or (type(given) is type(default) and not isinstance(given, Tensor) and given == default)
