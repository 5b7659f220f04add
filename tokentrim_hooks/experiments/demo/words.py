"""What the demo says of its figures: a few sentences, then one small table. Good and bad go through the same lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokentrim_hooks.experiments.compare.table import Row, by_window, number, percent, span
from tokentrim_hooks.experiments.compare.trials import Column
from tokentrim_hooks.experiments.demo.acts import Act
from tokentrim_hooks.metrics.intervals import LEAST_PAIRS, Difference, adjusted

COLUMNS = ("", "measure", "unpatched", "patched", "difference", "95 % interval", "verdict")
SHOWN = (
    *("error around the fault, +1", "error around the fault, +4"),
    *("background error", "sprites alive (identity)", "motion error"),
)
"""Measures of the small table; of those that a rollout has in several windows, the last window's."""
COURSE = {"contrast / true contrast": "contrast", "sprites alive (identity)": "share of sprites alive"}
"""Measures by which the first sentence says what drifts: both are 1 in the true video."""
NOTES = """\
Errors: lower is better; sprites alive: higher. Each figure is a mean over the videos: of the last chunks, or, where +1
or +4 stands, of the chunk so many after the fault. Differences are paired (same scene, same noise), each with its own
95 % t interval. A verdict has p below 0.05 after adjusting for all rows (Benjamini-Hochberg)."""


@dataclass(frozen=True)
class Line:
    """One row of the small table: a measure of an act under one policy."""

    act: Act
    row: Row
    column: Column
    difference: Difference

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or nothing."""
        return self.difference.verdict(self.column.better)

    @property
    def name(self) -> str:
        """The act; with the policy where it is not the paper's."""
        return self.act.name if self.row is self.act.rows[1] else f"{self.act.name}, {self.row.setting}"

    @property
    def change(self) -> str:
        """The difference and its interval, in words."""
        return f"{self.column.name} {number(self.difference.mean, sign=True)} {span(self.difference)}"


def lines_of(acts: Sequence[Act]) -> list[Line]:
    """The rows of the small table, adjusted for their number."""
    rows = [(act, row, column) for act in acts for row in act.rows[1:] for column in shown(act)]
    found = [Line(act, row, column, row.differences[column.key]) for act, row, column in rows]
    differences = adjusted([line.difference for line in found])
    return [replace(line, difference=difference) for line, difference in zip(found, differences, strict=True)]


def shown(act: Act) -> list[Column]:
    """The columns of an act that stand in the small table."""
    last = list(by_window(act.trial.columns))[-1]
    return [c for c in act.trial.columns if c.name in SHOWN and c.window in ("", last)]


def table(acts: Sequence[Act]) -> list[list[str]]:
    """The rows of the small table as text, under COLUMNS; each act and policy is named once."""
    rows, named = [], ""
    for line in lines_of(acts):
        d, name = line.difference, line.name
        values = [number(d.base), number(d.treated), number(d.mean, sign=True), span(d), d.words(line.column.better)]
        rows.append(["" if name == named else name, line.column.name, *values])
        named = name
    return rows


def sentences(acts: Sequence[Act]) -> list[str]:
    """What drifts; what pruning did for the fault, and its price; for slow drift; and what other policies did there."""
    fault, *drifts = acts
    lines = lines_of(acts)
    others = [_of_other(act, row, lines) for act in drifts for row in act.rows[2:]]
    return [_what_drifts(drifts), _of_fault(fault, lines), _of_slow_drift(drifts, lines), *others]


def _what_drifts(acts: Sequence[Act]) -> str:
    windows = list(by_window(acts[0].trial.columns))
    first, last = windows[0], windows[-1]
    parts = "; ".join(f"the {act.name} model's {_course(act, first, last)}" for act in acts)
    return f"What drifts: unpatched, from {first} to {last}, {parts}. In the true video both are 1."


def _course(act: Act, first: str, last: str) -> str:
    """How an unpatched model's figures change from one window to another."""
    values = {(c.name, c.window): f"{act.rows[0].differences[c.key].base:.2f}" for c in act.trial.columns}
    courses = [f"{word} goes from {values[name, first]} to {values[name, last]}" for name, word in COURSE.items()]
    return " and its ".join(courses)


def _of_fault(act: Act, lines: Sequence[Line]) -> str:
    row, error = act.rows[1], next(line for line in lines if line.column.name == SHOWN[0])
    worse = [line.change for line in lines if line.act is act and line.verdict == "worse"]
    price = ", ".join([f"{percent(row.extra)} more denoiser calls", *worse])
    d = error.difference
    return (
        f"The fault: a blotch planted in the context was caught at once in {percent(row.watched)} of {row.pairs} "
        f"videos; pruning changed the error around it, one chunk later, by {number(d.mean, sign=True)} {span(d)} from "
        f"{number(d.base)} ({d.words('lower')}). The price: {price}."
    )


def _of_slow_drift(acts: Sequence[Act], lines: Sequence[Line]) -> str:
    rates = " and ".join(f"{percent(act.rows[1].pruned)} of the chunks ({act.name})" for act in acts)
    papers = [line for line in lines if line.act in acts and line.row is line.act.rows[1]]
    found = [f"{line.act.name}: {line.change} ({line.verdict})" for line in papers if line.verdict]
    nothing = "no measure got better or worse: it is made for sudden faults and does not move slow drift"
    return f"Slow drift: the paper's policy pruned {rates}; {_moved(found, acts[0].rows[1], nothing)}."


def _of_other(act: Act, row: Row, lines: Sequence[Line]) -> str:
    """What another policy did in an act: whatever got better or worse."""
    found = [f"{line.change} ({line.verdict})" for line in lines if line.row is row and line.verdict]
    nothing = f"no measure got better or worse over {row.pairs} videos"
    return f"Another policy, {row.setting}, on the {act.name} model: {_moved(found, row, nothing)}."


def _moved(found: Sequence[str], row: Row, nothing: str) -> str:
    if found:
        return "; ".join(found)
    if row.pairs < LEAST_PAIRS:
        return f"below {LEAST_PAIRS} videos there is no verdict on what that did"
    return nothing
