"""The demo's results as rows of text and as JSON. Favourable and unfavourable figures go through the same lines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tokentrim_hooks.console import plain_table
from tokentrim_hooks.demo_measures import Line, caught, cost, drift_lines, fault_lines
from tokentrim_hooks.demo_runs import Runs
from tokentrim_hooks.paired import Difference

HEADINGS = ("", "unpatched", "TokenTrim", "difference", "95 % interval", "the interval ...")
KINDS = {"context": "fault in context", "chunk": "fault in chunk"}

Table = tuple[str, tuple[str, ...], list[list[str]]]
"""Title, headings, rows."""


def tables(runs: Runs) -> list[Table]:
    """The three tables of the demo."""
    size = runs.size
    faults = [row for kind, label in KINDS.items() for row in rows_of(fault_lines(runs, kind), f"{label}, ")]
    return [
        (
            f"Natural drift: {size.scenes} videos, {size.chunks} chunks generated after a given one",
            HEADINGS,
            rows_of(drift_lines(runs)),
        ),
        (
            f"Planted fault: {size.healthy} true chunks, one with a blotch, then {size.after} generated; {size.scenes} videos",
            HEADINGS,
            faults,
        ),
        ("Triggers and cost", ("", "natural drift", *KINDS.values()), _cost_rows(runs)),
    ]


def rows_of(lines: list[Line], prefix: str = "") -> list[list[str]]:
    """Rows of a table of differences, a heading row before each window."""
    rows: list[list[str]] = []
    last = None
    for line in lines:
        if line.window != last:
            rows.append([prefix + line.window, *[""] * 5])
        rows.append([f"  {line.metric}{_BETTER[line.better]}", *difference_cells(line.difference, line.better)])
        last = line.window
    return rows


_BETTER = {"lower": " (less is better)", "higher": " (more is better)", "": ""}


def difference_cells(difference: Difference, better: str) -> list[str]:
    """Both means, the difference, its interval, the verdict in words."""
    d = difference
    span = f"[{number(d.low, sign=True)}, {number(d.high, sign=True)}]"
    return [number(d.base), number(d.treated), number(d.mean, sign=True), span, d.words(better)]


def number(value: float, sign: bool = False) -> str:
    """Three decimals; a dash where there was nothing to measure."""
    if math.isnan(value):
        return "-"
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def _cost_rows(runs: Runs) -> list[list[str]]:
    """One row a quantity, one column a patched rollout."""
    pairs = [(runs.drift["unpatched"], runs.drift["tokentrim"])]
    pairs += [(runs.fault["unpatched"], runs.fault[kind]) for kind in KINDS]
    costs = [cost(*pair) for pair in pairs]
    found = [caught(runs, kind) for kind in KINDS]
    return [
        ["chunks judged", *(str(c.judged) for c in costs)],
        ["pruned and regenerated", *(f"{c.triggered} ({percent(c.triggered / max(c.judged, 1))})" for c in costs)],
        ["fault caught at once", "-", *(percent(f.at_once) for f in found)],
        ["false alarms before the fault", "-", *(percent(f.false_alarms) for f in found)],
        ["token positions pruned", *(str(c.tokens) for c in costs)],
        ["extra denoiser calls, each video alone", *(f"+{percent(c.alone)}" for c in costs)],
        ["extra denoiser calls, this batch", *(f"+{percent(c.extra / max(c.calls, 1))}" for c in costs)],
        ["wall clock, patched / unpatched", *(f"x {c.clock:.2f}" for c in costs)],
    ]


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


NOTES = """\
difference: TokenTrim minus unpatched, paired over videos (same scene, same noise); interval: percentile bootstrap.
fault in context: only the cache was corrupted; fault in chunk: also the accepted chunk that TokenTrim compares with.
false alarms: share of the true chunks before the fault that were pruned all the same.
extra calls: in a batch one flagged video makes all of them be computed again (and only its own result is used), so a
batch pays more than its videos would alone; wall clock is the batch's."""


def as_text(runs: Runs) -> str:
    """All tables as plain text, with notes."""
    parts = [f"{title}\n{plain_table(headings, rows)}" for title, headings, rows in tables(runs)]
    return "\n\n".join([*parts, NOTES]) + "\n"


def as_json(runs: Runs, settings: dict[str, Any]) -> dict[str, Any]:
    """All results; an unbounded interval end or a missing value is null."""
    return {
        "settings": {**settings, **dataclasses.asdict(runs.size)},
        "drift": [_line(line) for line in drift_lines(runs)],
        "drift_cost": dataclasses.asdict(cost(runs.drift["unpatched"], runs.drift["tokentrim"])),
        "fault": {kind: _fault(runs, kind) for kind in KINDS},
    }


def _fault(runs: Runs, kind: str) -> dict[str, Any]:
    return {
        "lines": [_line(line) for line in fault_lines(runs, kind)],
        **dataclasses.asdict(caught(runs, kind)),
        "cost": dataclasses.asdict(cost(runs.fault["unpatched"], runs.fault[kind])),
    }


def _line(line: Line) -> dict[str, Any]:
    values = {name: value if math.isfinite(value) else None for name, value in _fields(line.difference).items()}
    zero = line.difference.excludes_zero
    return {"window": line.window, "metric": line.metric, "better": line.better, **values, "excludes_zero": zero}


def _fields(difference: Difference) -> dict[str, float]:
    return dataclasses.asdict(difference)
