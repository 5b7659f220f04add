"""TokenTrim, the paper's policy (arXiv 2602.00268, Algorithm 1), and one that only measures as it does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import severity_of, unstable_tokens
from tokentrim_hooks.policy.options import number, whole
from tokentrim_hooks.policy.views import Chunk, History, Verdict


@dataclass(frozen=True)
class DriftPolicy(Policy):
    """Prune the most drifting tokens of a chunk that drifts more than its predecessors did (Eq. 5 to 8).

    The paper's constants are the defaults.

    Args:
        fraction: p, the share of spatial tokens in the unstable set, 0 < p <= 1.
        sensitivity: lambda; a chunk is unstable when its severity exceeds mean + lambda * std, >= 0.
        warmup: T_warm; with fewer severities seen than this, nothing is pruned.
        max_regenerations, persist, prune_anchors, coarse: see :class:`Policy`.

    Example:
        >>> handle = tokentrim.patch(pipeline, DriftPolicy(fraction=0.05, persist=False))  # doctest: +SKIP
    """

    fraction: float = 0.1
    sensitivity: float = 2.0
    warmup: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trigger(self.fraction, self.sensitivity)
        whole("warmup", self.warmup)

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """Flag the samples whose severity exceeds mean + lambda * std (Eq. 6 and 8)."""
        warm = history.count >= max(self.warmup, 1)
        return measured(chunk.drift, history, self.fraction, self.sensitivity, flags=warm)


@dataclass(frozen=True)
class ObservePolicy(Policy):
    """Measure as :class:`DriftPolicy` does and never prune: output stays bit-identical.

    Args:
        fraction, sensitivity: see :class:`DriftPolicy`.
    """

    fraction: float = 0.1
    sensitivity: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trigger(self.fraction, self.sensitivity)

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """Measure severity and threshold; ``prune`` is False for every sample."""
        return measured(chunk.drift, history, self.fraction, self.sensitivity)

    @property
    def regenerates(self) -> bool:
        """Never."""
        return False


def check_trigger(fraction: float, sensitivity: float) -> None:
    """Check the two options of the paper's trigger; ValueError names the range."""
    number("fraction", fraction, 1e-12, 1.0, "in (0, 1]")
    number("sensitivity", sensitivity, 0.0, math.inf, "a finite number >= 0")


def measured(drift: Tensor, history: History, fraction: float, sensitivity: float, flags: bool = False) -> Verdict:
    """The paper's unstable set, severity and threshold of ``drift`` ``[B, N]``.

    With ``flags`` samples whose severity exceeds the threshold are to be pruned; without, none.
    """
    tokens = unstable_tokens(drift, fraction)
    severity = severity_of(drift, tokens)
    threshold = _threshold(history, sensitivity, severity)
    # Compared in the wider of the two types.
    prune = severity > threshold if flags else torch.zeros_like(severity, dtype=torch.bool)
    return Verdict(tokens, severity, threshold, prune)


def _threshold(history: History, sensitivity: float, severity: Tensor) -> Tensor:
    """mean + lambda * std ``[B]``; infinite while there is no severity to compare with."""
    if history.count == 0:
        return torch.full_like(severity, math.inf)
    return torch.add(history.mean, history.std, alpha=sensitivity)
