"""At what share of dead tokens a pruned rollout costs what an unpatched one does: a trigger pays, attention saves.

Every dead key is left out of attention until it has left the context, so what a trigger costs is fixed and what it
saves grows with the share that it prunes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokentrim_hooks.experiments.bench.measure import FRACTION, Ratio, forced_chunks
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.testing.policies import ForcedPolicy


def forced(shares: Iterable[float], chunks: int) -> dict[str, Policy]:
    """An arm for each share of the tokens, with triggers where the forced arm of every run has them."""
    return {named(share): ForcedPolicy(dict.fromkeys(forced_chunks(chunks), share)) for share in shares}


def named(share: float) -> str:
    """Name of an arm."""
    return f"forced trigger, {100 * share:g} %"


def break_even(ratios: Iterable[Ratio], shares: Iterable[float]) -> float | None:
    """The share at which the least-squares line through the arms' ratios to unpatched passes 1.

    None where fewer than two shares were measured, or where no share between 0 and 1 breaks even.
    """
    import numpy as np

    found = {ratio.name: ratio.median for ratio in ratios}
    points = _points(found, {**dict.fromkeys(shares), FRACTION: None})
    if len(points) < 2:
        return None
    slope, start = np.polyfit(list(points), list(points.values()), 1)
    share = (1 - start) / slope if slope else -1.0
    return float(share) if 0 < share < 1 else None


def _points(found: Mapping[str, float], shares: Iterable[float]) -> dict[float, float]:
    names = {share: "forced trigger" if share == FRACTION else named(share) for share in shares}
    return {share: found[f"{name} / unpatched"] for share, name in names.items() if f"{name} / unpatched" in found}
