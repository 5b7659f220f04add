"""Policies as a node offers them: by name, with one strength, and with any field of theirs as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Policy

from .adapter import ComfyAR

STRENGTHS: dict[str, Callable[[float], dict[str, Any]]] = {
    "drift": lambda s: {"fraction": min(0.1 * s, 1.0)},
    "adaptive": lambda s: {"fraction": min(0.06 * s, 1.0)},
    "latent-moments": lambda s: {"strength": min(0.35 * s, 1.0)},
    "row-moments": lambda s: {"strength": min(0.35 * s, 1.0)},
    "soft-prune": lambda s: {"weight": max(1 - 0.5 * s, 0.0)},
}
"""What strength does to a policy, 1 being its own default; to others it does nothing but switch them off at 0."""


def choices() -> list[str]:
    """Names of the installed policies that the model takes; the paper's first."""
    taken = [info.name for info in tokentrim.policies() if not info.error and set(info.hooks) <= ComfyAR.takes]
    return sorted(taken, key=lambda name: (name != "drift", name))


def policy_of(name: str, strength: float, options: str = "") -> Policy:
    """The policy ``name``; at strength 0 one that measures and changes nothing.

    Args:
        name: one of :func:`choices`. strength: 1 for the policy's defaults.
        options: a JSON object of further fields, which win over ``strength``; may be empty.

    Raises:
        ValueError, TypeError: a value out of range, or a field that the policy has not.
    """
    fields = _fields(options)
    if strength <= 0:
        return tokentrim.ObservePolicy()
    scaled = STRENGTHS[name](strength) if name in STRENGTHS else {}
    return tokentrim.make_policy(name, **{**scaled, **fields})


def _fields(options: str) -> dict[str, Any]:
    try:
        fields = json.loads(options or "{}")
    except json.JSONDecodeError as failure:
        raise ValueError(f'options is no JSON ({failure}).\nWrite it like {{"sensitivity": 1.5}}.') from None
    if not isinstance(fields, dict):
        raise ValueError(f'options must be a JSON object, got {options!r}.\nWrite it like {{"sensitivity": 1.5}}.')
    return fields
