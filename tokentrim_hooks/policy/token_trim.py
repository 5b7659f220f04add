"""The paper's policy, and one that only measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import History, Verdict
from tokentrim_hooks.policy.drift import severity_of, unstable_tokens


def _number(name: str, value: object, low: float, high: float, rule: str) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number >= 0, got {value!r}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class DriftPolicy:
    """The paper's policy (Algorithm 1; its constants are the defaults).

    Attributes:
        fraction: p, the share of spatial tokens in the unstable set, 0 < p <= 1.
        sensitivity: lambda; a chunk is unstable when its severity exceeds mean + lambda * std, >= 0.
        warmup: T_warm; with fewer severities seen than this, nothing is pruned.
        max_regenerations: R, regenerations a chunk at most; 0 prunes nothing.
        persist: the pruned context goes forward (the paper, line 19); False brings the tokens back after the chunk.
        prune_anchors: also prune sinks and anchors, which are spared by default.
        coarse: where one key of the context covers several tokens (FramePack, Helios), it dies with ``"any"`` of them
            (the pruned content is gone for sure) or only with ``"all"`` of them (less is lost beside it).
    """

    fraction: float = 0.1
    sensitivity: float = 2.0
    warmup: int = 2
    max_regenerations: int = 1
    persist: bool = True
    prune_anchors: bool = False
    coarse: Literal["any", "all"] = "any"

    def __post_init__(self) -> None:
        _number("fraction", self.fraction, 1e-12, 1.0, "in (0, 1]")
        _number("sensitivity", self.sensitivity, 0.0, math.inf, "a finite number >= 0")
        _whole("warmup", self.warmup)
        _whole("max_regenerations", self.max_regenerations)
        _flag("persist", self.persist)
        _flag("prune_anchors", self.prune_anchors)
        if self.coarse not in ("any", "all"):
            raise ValueError(f"coarse must be 'any' or 'all', got {self.coarse!r}")

    def judge(self, drift: Tensor, history: History) -> Verdict:
        """Flag the samples whose severity exceeds mean + lambda * std (Eq. 6 and 8)."""
        tokens = unstable_tokens(drift, self.fraction)
        severity = severity_of(drift, tokens)
        threshold = _threshold(history, self.sensitivity, severity)
        ready = history.count >= max(self.warmup, 1)
        prune = severity.to(threshold.dtype) > threshold if ready else torch.zeros_like(severity, dtype=torch.bool)
        return Verdict(tokens, severity, threshold, prune)


@dataclass(frozen=True)
class ObservePolicy:
    """Measures as :class:`DriftPolicy` does and never prunes: output stays bit-identical."""

    fraction: float = 0.1
    sensitivity: float = 2.0

    def __post_init__(self) -> None:
        DriftPolicy(self.fraction, self.sensitivity)

    def judge(self, drift: Tensor, history: History) -> Verdict:
        """Measure severity and threshold; ``prune`` is False for every sample."""
        tokens = unstable_tokens(drift, self.fraction)
        severity = severity_of(drift, tokens)
        threshold = _threshold(history, self.sensitivity, severity)
        return Verdict(tokens, severity, threshold, torch.zeros_like(severity, dtype=torch.bool))


def _threshold(history: History, sensitivity: float, severity: Tensor) -> Tensor:
    """mean + lambda * std ``[B]``; infinite while there is no severity to compare with."""
    if history.count == 0:
        return torch.full_like(severity, math.inf)
    return history.mean + sensitivity * history.std
