"""What settings of AdaptivePolicy would have flagged: ``python -m tokentrim_hooks.experiments.search``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tokentrim_hooks.console import show_table
from tokentrim_hooks.experiments.search.watched import Watched, asked, kept
from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.reference.fault import FAULTS, Where

GRID: dict[str, tuple[Any, ...]] = {
    "fraction": (0.06, 0.1),
    "sensitivity": (1.0, 1.5, 2.0),
    "floor": (0.2, 0.3, 0.4),
    "fresh": (0.6, 0.7, 0.8),
    "warmup": (2, 3),
}
SOUGHT: tuple[Where, ...] = ("context", "settled", "late", "noise")
FIRST = min(FAULTS[fault].first for fault in SOUGHT)
"""The first chunk of which any of them corrupts what is written; it is itself still predicted from a true context."""
CHUNKS = 30
"""Of a rollout without a fault; one with a fault ends with the chunk in which that is to be noticed."""


def settings() -> Iterator[AdaptivePolicy]:
    """Every setting of the grid."""
    for values in itertools.product(*GRID.values()):
        yield AdaptivePolicy(**dict(zip(GRID, values, strict=True)))


def shares(policy: AdaptivePolicy, rollouts: Sequence[Watched]) -> dict[str, float]:
    """By name of the rollout: of the videos those whose fault is flagged, or of the chunks where there is no fault.

    ``true scenes``: of the chunks up to the fault, which are predicted from a true context, so each flag is false.
    """
    found, true = {}, []
    for watched in rollouts:
        flags = watched.flags(policy).float()
        if watched.watch is not None:
            true.append(flags[:FIRST])
            flags = flags[watched.watch - 1]
        found[watched.name] = float(flags.mean())
    if true:
        found["true scenes"] = float(torch.cat(true, dim=1).mean())
    return found


def main() -> None:
    """Command line."""
    out, seeds = asked(__doc__, seeds=64)
    rollouts = [kept(out, kind, None, seeds, CHUNKS) for kind in ("fading", "burning")]
    rollouts += [kept(out, "fading", fault, seeds, FAULTS[fault].last + 1) for fault in SOUGHT]
    found = {str(policy): shares(policy, rollouts) for policy in settings()}
    heads = ["setting", *next(iter(found.values()))]
    show_table(heads, [[name, *(f"{share:.3f}" for share in each.values())] for name, each in found.items()])


if __name__ == "__main__":
    main()
