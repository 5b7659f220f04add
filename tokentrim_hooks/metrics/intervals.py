"""Paired differences with t intervals: two arms over the same scenes and the same noise, corrected for many questions.

How often a true difference of zero is called one (p below 0.05), in simulation (tests/metrics/test_intervals.py):

- 5 % at any number of pairs where differences are normal; less (0.2 to 5 %) where they are heavy-tailed, mostly zero,
  or where both arms come from one skewed distribution. The percentile bootstrap gave 20 to 10 % at 4 to 12 pairs.
- More where the *differences* are skewed though their mean is zero: 8 % at 6 to 12 pairs of centred lognormal numbers
  with sigma 0.5, 17 % with sigma 1 (64 pairs: 6 and 9 %). No test of a mean repairs that; more pairs do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokentrim_hooks.extras import require

if TYPE_CHECKING:
    import numpy.typing as npt

LEVEL = 0.05
"""Adjusted p below which a comparison gets a verdict; intervals hold 1 - LEVEL."""
LEAST_PAIRS = 6
"""Below so many pairs no verdict: a sign-flip test of five cannot reach p = 0.05 at all."""
RESAMPLES = 9999
"""Sign flips; up to 13 pairs all of them are tried and p is exact."""
SEED = 20260
"""Fixed, so that the same measurements give the same p."""
ROUNDING = 1e-12
"""Differences that vary by less than this share of the largest are taken as all equal."""

TOO_FEW = "too few pairs"
NOTHING = "no difference shown"


@dataclass(frozen=True)
class Difference:
    """Mean of ``treated - base`` over pairs, with its 95 % interval ``[low, high]`` and what it proves.

    Attributes:
        base, treated: the two arms' means over the same pairs.
        mean, low, high: the difference and its interval, for this comparison alone; all reals below two pairs.
        p: of so large a difference by luck, two-sided; NaN below two pairs.
        q: ``p`` adjusted for the comparisons that stand in one table (:func:`adjusted`); NaN without a verdict.
        pairs: how many.
    """

    base: float
    treated: float
    mean: float
    low: float
    high: float
    p: float
    q: float
    pairs: int

    @property
    def tested(self) -> bool:
        """Whether there are pairs enough for a verdict."""
        return self.pairs >= LEAST_PAIRS and not math.isnan(self.p)

    def verdict(self, better: str = "") -> str:
        """"better" or "worse" where ``better`` says "lower" or "higher", else "lower" or "higher"; "" for neither."""
        if not self.tested or not self.q < LEVEL or self.mean == 0:
            return ""
        side = "lower" if self.mean < 0 else "higher"
        if better not in ("lower", "higher"):
            return side
        return "better" if side == better else "worse"

    def words(self, better: str = "") -> str:
        """The verdict, or why there is none."""
        return self.verdict(better) or (NOTHING if self.tested else TOO_FEW)


def paired_difference(
    base: Sequence[float], treated: Sequence[float], *, test: Literal["t", "sign-flip"] = "t"
) -> Difference:
    """Difference of two arms, pair by pair, with a 95 % t interval; p by the t test or by flipping signs.

    Pairs in which either value is NaN (nothing to measure) are left out.

    Raises:
        ValueError: the arms differ in length.
    """
    if len(base) != len(treated):
        raise ValueError(f"paired arms must be of equal length, got {len(base)} and {len(treated)}")
    pairs = [(a, b) for a, b in zip(base, treated, strict=True) if not (math.isnan(a) or math.isnan(b))]
    differences = [b - a for a, b in pairs]
    low, high, p = -math.inf, math.inf, math.nan
    if len(pairs) > 1 and all(map(math.isfinite, differences)):
        low, high, p = (float(value) for value in t_interval(differences))
        p = p if test == "t" else float(sign_flip(differences))
    left, right = _mean([a for a, _ in pairs]), _mean([b for _, b in pairs])
    found = Difference(left, right, _mean(differences), low, high, p, p, len(pairs))
    return found if found.tested else dataclasses.replace(found, q=math.nan)


def adjusted(differences: Sequence[Difference]) -> list[Difference]:
    """The comparisons of one table with ``q``: p after Benjamini and Hochberg (1995), by scipy.

    Of all verdicts that such a table gives, at most 5 % are luck on average. Comparisons of too few pairs do not count.
    """
    tested = [i for i, difference in enumerate(differences) if difference.tested]
    if not tested:
        return list(differences)
    values = require("scipy.stats", "demo").false_discovery_control([differences[i].p for i in tested])
    q = dict(zip(tested, map(float, values), strict=True))
    return [dataclasses.replace(d, q=q.get(i, math.nan)) for i, d in enumerate(differences)]


def t_interval(values: npt.ArrayLike) -> tuple[Any, Any, Any]:
    """Ends of the 95 % t interval of the mean over the last axis (two or more values), and the two-sided p of zero.

    Where all values are equal, t is 0/0 or infinite: the interval is that value, and p that of so many equal signs.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    count, mean = values.shape[-1], values.mean(-1)
    equal = np.ptp(values, axis=-1) <= ROUNDING * np.abs(values).max(-1)
    varied = np.where(equal[..., None], np.arange(count), values)
    result = require("scipy.stats", "demo").ttest_1samp(varied, 0.0, axis=-1)
    inside = result.confidence_interval(1 - LEVEL)
    signs = np.where(mean == 0, 1.0, 0.5 ** (count - 1))
    low, high = (np.where(equal, mean, end) for end in (inside.low, inside.high))
    return low, high, np.where(equal, signs, result.pvalue)


def sign_flip(values: npt.ArrayLike) -> Any:
    """Two-sided p of a mean of zero over the last axis, by flipping signs; exact up to 13 values."""
    import numpy as np

    result = require("scipy.stats", "demo").permutation_test(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        axis=-1,
        rng=np.random.default_rng(SEED),
    )
    return result.pvalue


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
