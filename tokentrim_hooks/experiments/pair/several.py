"""Several pairs as a comparison's table: means of differences, intervals, verdicts from six pairs on."""

from __future__ import annotations

from collections.abc import Mapping

from tokentrim_hooks.console import plain_table
from tokentrim_hooks.experiments.compare.settings import BASE
from tokentrim_hooks.experiments.compare.store import Outcome
from tokentrim_hooks.experiments.compare.table import NOTES, summarise, terminal
from tokentrim_hooks.experiments.pair.curves import COLUMNS
from tokentrim_hooks.experiments.pair.words import Pair


def table(pairs: Mapping[int, Pair]) -> str:
    """The table and how to read it, as ``tokentrim compare`` prints it; ``pairs`` by their seeds."""
    outcomes = [outcome for seed, pair in pairs.items() for outcome in outcomes_of(seed, pair)]
    rows = summarise(outcomes, COLUMNS)
    return "\n\n".join([*(plain_table(heads, lines) for heads, lines in terminal(rows, COLUMNS)), NOTES])


def outcomes_of(seed: int, pair: Pair) -> list[Outcome]:
    """The unpatched and the patched run of a pair, as outcomes of a comparison."""
    first = [r for r in pair.report if (r.video, r.sample) == (0, 0)]
    judged = sum(r.severity is not None for r in first)
    calls, extra = sum(sum(r.phases.values()) for r in first), sum(r.extra_calls for r in first)
    values = [{key: [value] for key, value in some.items()} for some in (pair.unpatched, pair.patched)]
    unpatched, patched = pair.seconds
    return [
        Outcome(BASE, {}, [seed], values[0], [0], [[]], len(first), calls, 0, [0], unpatched),
        Outcome("patched", {}, [seed], values[1], [judged], [pair.pruned], len(first), calls, extra, [extra], patched),
    ]
