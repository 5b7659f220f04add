"""What the demo says of its figures: three sentences, then one small table. Good and bad go through the same lines."""

from __future__ import annotations

from collections.abc import Sequence

from tokentrim_hooks.experiments.compare.table import by_window, number, percent, span
from tokentrim_hooks.experiments.compare.trials import Column
from tokentrim_hooks.experiments.demo.acts import Act
from tokentrim_hooks.metrics.intervals import LEAST_PAIRS, Difference, adjusted

COLUMNS = ("measure", "unpatched", "pruned", "difference", "95 % interval", "verdict")
SHOWN = (
    *("error around the fault, +1", "error around the fault, +4"),
    *("sprites alive (identity)", "error to ground truth", "saturation error", "motion error"),
)
"""Measures of the small table; of those that a rollout has in several windows, the last window's."""
FIGURES = ("sprites alive (identity)", "error to ground truth")
"""Measures by which the first sentence says what drifts."""
NOTES = """\
Errors: lower is better; sprites alive: higher. Differences are paired over videos (same scene, same noise), intervals
are t intervals of one row alone; a verdict has p below 0.05 after adjusting for all rows (Benjamini-Hochberg)."""

Line = tuple[str, Difference, str]
"""Where and what was measured, the difference, which side is better."""


def lines_of(acts: Sequence[Act]) -> list[Line]:
    """The rows of the small table, adjusted for their number."""
    found = [(f"{act.title.lower()}: {_name(c)}", act.rows[1].differences[c.key], c.better)
             for act in acts for c in shown(act)]  # fmt: skip
    differences = adjusted([difference for _, difference, _ in found])
    return [(name, d, better) for (name, _, better), d in zip(found, differences, strict=True)]


def shown(act: Act) -> list[Column]:
    """The columns of an act that stand in the small table."""
    last = list(by_window(act.trial.columns))[-1]
    return [c for c in act.trial.columns if c.name in SHOWN and c.window in ("", last)]


def table(acts: Sequence[Act]) -> list[list[str]]:
    """The rows of the small table as text, under COLUMNS."""
    return [
        [name, number(d.base), number(d.treated), number(d.mean, sign=True), span(d), d.words(better)]
        for name, d, better in lines_of(acts)
    ]


def sentences(acts: Sequence[Act]) -> list[str]:
    """What drifts; what pruning did for the fault, and at what price; what it did for slow drift."""
    fault, *drifts = acts
    lines = lines_of(acts)
    return [_drifts(drifts), _of_fault(fault, lines), *(_of_drift(act, lines) for act in drifts)]


def _drifts(acts: Sequence[Act]) -> str:
    parts = [f"{act.title.lower()}: {_course(act)}" for act in acts]
    return f"What drifts: left alone, the small model loses its scene ({'; '.join(parts)})."


def _course(act: Act) -> str:
    """How an unpatched model's figures change from the first window to the last."""
    off, groups = act.rows[0], by_window(act.trial.columns)
    first, last = next(iter(groups)), list(groups)[-1]
    values = {(c.name, c.window): off.differences[c.key].base for c in act.trial.columns}
    changes = [f"{name} {number(values[name, first])} -> {number(values[name, last])}" for name in FIGURES]
    return f"{', '.join(changes)} from {first} to {last}"


def _of_fault(act: Act, lines: Sequence[Line]) -> str:
    row = act.rows[1]
    error = next(d for name, d, _ in lines if "around the fault, +1" in name)
    others = [f"{name.partition(': ')[2]} {number(d.mean, sign=True)} {span(d)}" for name, d, better in lines
              if name.startswith(act.title.lower()) and d.verdict(better) == "worse"]  # fmt: skip
    price = ", ".join([f"{percent(row.extra)} more denoiser calls", *others])
    return (
        f"The fault: pruning caught it at once in {percent(row.watched)} of {row.pairs} videos and changed the error "
        f"around it by {number(error.mean, sign=True)} {span(error)} from {number(error.base)} one chunk later "
        f"({error.words('lower')}); the price: {price}."
    )


def _of_drift(act: Act, lines: Sequence[Line]) -> str:
    row = act.rows[1]
    verdicts = [f"{name.partition(': ')[2]} {d.verdict(better)}" for name, d, better in lines
                if name.startswith(act.title.lower()) and d.verdict(better)]  # fmt: skip
    few = f"no verdict below {LEAST_PAIRS} videos" if row.pairs < LEAST_PAIRS else "no measure better or worse"
    return (
        f"Slow drift: the paper's policy pruned {percent(row.pruned)} of the judged chunks; "
        f"{', '.join(verdicts) or few}: it is made for sudden faults, and does not move slow drift here."
    )


def _name(column: Column) -> str:
    return f"{column.name}, {column.window}" if column.window else column.name
