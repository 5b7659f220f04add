"""Paired differences with bootstrap intervals: two arms over the same scenes and the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 9999
SEED = 20260
"""Fixed, so that the same measurements give the same interval."""


@dataclass(frozen=True)
class Difference:
    """Mean of ``treated - base`` over pairs, with its 95 % interval ``[low, high]``.

    ``base`` and ``treated`` are the two arms' means over the same ``pairs`` pairs.
    """

    base: float
    treated: float
    mean: float
    low: float
    high: float
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval; an end on zero does not exclude it."""
        return self.low > 0 or self.high < 0

    def words(self, better: str = "") -> str:
        """The verdict in plain words; ``better`` ("lower" or "higher") adds in whose favour."""
        if not self.excludes_zero:
            return "does not exclude zero"
        if better not in ("lower", "higher"):
            return "excludes zero"
        good = (self.mean < 0) == (better == "lower")
        return f"excludes zero: {'better' if good else 'WORSE'}"


def paired_difference(base: Sequence[float], treated: Sequence[float]) -> Difference:
    """Difference of two arms, pair by pair, with a 95 % percentile bootstrap interval over the pairs.

    Pairs in which either value is NaN (nothing to measure) are left out. Resamples with a fixed seed.

    Raises:
        ValueError: the arms differ in length.
    """
    if len(base) != len(treated):
        raise ValueError(f"paired arms must be of equal length, got {len(base)} and {len(treated)}")
    pairs = [(a, b) for a, b in zip(base, treated, strict=True) if not (math.isnan(a) or math.isnan(b))]
    differences = [b - a for a, b in pairs]
    low, high = interval(differences)
    left, right = _mean([a for a, _ in pairs]), _mean([b for _, b in pairs])
    return Difference(left, right, _mean(differences), low, high, len(pairs))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; all reals for fewer than two values: one pair proves nothing."""
    import numpy as np
    from scipy.stats import bootstrap

    if len(values) < 2:
        return -math.inf, math.inf
    # The percentile method, since bias correction is undefined where most differences are exactly zero.
    result = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
