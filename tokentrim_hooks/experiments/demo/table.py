"""The demo's results as rows of text and as JSON. Favourable and unfavourable figures go through the same lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tokentrim_hooks.console import plain_table
from tokentrim_hooks.experiments.demo.measures import Line, Results
from tokentrim_hooks.metrics.intervals import LEAST_PAIRS, Difference

HEADINGS = ("", "unpatched", "TokenTrim", "difference", "95 % interval", "verdict")

Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, headings, rows."""

NOTES = """\
Errors: lower is better; sprites alive: higher is better; motion / true motion: 1 is right.
Difference: TokenTrim minus unpatched, paired over videos (same scene, same noise), with its own 95 % t interval.
Verdict: p below 0.05 after adjusting for all comparisons of the table (Benjamini-Hochberg); none below 6 pairs.
Fault in context: only the cache was corrupted; fault in chunk: also the accepted chunk that TokenTrim compares with.
False alarms: share of the true chunks before the fault that were pruned all the same.
Extra calls: in a batch one flagged video makes all of them be computed again (only its own result is used), so a batch
pays more than its videos would alone. Wall clock: the batch's, one run each; a busy machine shows in it."""


def tables(results: Results) -> list[Table]:
    """The three tables of the demo."""
    size = results.size
    drift = f"Natural drift: {size.scenes} videos, {size.chunks} chunks generated after a given one"
    fault = f"Planted fault: {size.healthy} true chunks, one with a blotch, then {size.after} generated"
    faults = [row for where, found in results.fault.items() for row in rows_of(found.lines, f"fault in {where}, ")]
    costs = ("", "natural drift", *(f"fault in {where}" for where in results.fault))
    return [
        (drift, HEADINGS, rows_of(results.drift)),
        (fault, HEADINGS, faults),
        ("Triggers and cost", costs, _cost_rows(results)),
    ]


def remarks(results: Results) -> list[str]:
    """What the tables imply, in words."""
    found = []
    if not results.drift_cost.triggered:
        found.append("Natural drift: no severity exceeded its threshold, TokenTrim never pruned, both arms are equal.")
    lines = [*results.drift, *(line for fault in results.fault.values() for line in fault.lines)]
    verdicts = [line.difference.verdict(line.better) for line in lines if line.better and line.difference.tested]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    found.append(
        f"Of {len(verdicts)} comparisons {better} are better and {worse} worse, after adjusting for their number."
        if verdicts
        else f"Fewer than {LEAST_PAIRS} videos: no verdict on any difference."
    )
    return found


def rows_of(lines: Sequence[Line], prefix: str = "") -> list[list[str]]:
    """Rows of a table of differences, a heading row before each window."""
    rows: list[list[str]] = []
    last = None
    for line in lines:
        if line.window != last:
            rows.append([prefix + line.window, *[""] * 5])
        rows.append([f"  {line.metric}", *difference_cells(line.difference, line.better)])
        last = line.window
    return rows


def difference_cells(difference: Difference, better: str) -> list[str]:
    """Both means, the difference, its interval, the verdict or why there is none."""
    d = difference
    span = f"[{number(d.low, sign=True)}, {number(d.high, sign=True)}]"
    return [number(d.base), number(d.treated), number(d.mean, sign=True), span, d.words(better)]


def number(value: float, sign: bool = False) -> str:
    """Three decimals, more where they would hide that it is not zero; a dash where there was nothing to measure."""
    if math.isnan(value):
        return "-"
    digits = ".3f" if value == 0 or abs(value) >= 0.0005 else ".0e"
    return f"{value:{'+' if sign else ''}{digits}}"


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def _cost_rows(results: Results) -> list[list[str]]:
    """One row a quantity, one column a patched rollout."""
    faults = list(results.fault.values())
    costs = [results.drift_cost, *(fault.cost for fault in faults)]
    return [
        ["chunks judged", *(str(c.judged) for c in costs)],
        ["pruned and regenerated", *(f"{c.triggered} ({percent(c.triggered / max(c.judged, 1))})" for c in costs)],
        ["fault caught at once", "-", *(percent(f.at_once) for f in faults)],
        ["false alarms before the fault", "-", *(percent(f.false_alarms) for f in faults)],
        ["token positions pruned", *(str(c.tokens) for c in costs)],
        ["extra denoiser calls, each video alone", *(f"+{percent(c.alone)}" for c in costs)],
        ["extra denoiser calls, this batch", *(f"+{percent(c.extra / max(c.calls, 1))}" for c in costs)],
        ["wall clock, patched / unpatched", *(f"x {c.clock:.2f}" for c in costs)],
    ]


def as_text(results: Results) -> str:
    """All tables as plain text, with notes."""
    parts = [f"{title}\n{plain_table(headings, rows)}" for title, headings, rows in tables(results)]
    return "\n\n".join([*parts, "\n".join(remarks(results)), NOTES]) + "\n"


def as_json(results: Results, settings: dict[str, Any]) -> dict[str, Any]:
    """All results; an unbounded interval end or a missing value is null."""
    return {
        "settings": {**settings, **dataclasses.asdict(results.size)},
        "drift": [_line(line) for line in results.drift],
        "drift_cost": dataclasses.asdict(results.drift_cost),
        "fault": {
            where: {
                "lines": [_line(line) for line in fault.lines],
                "at_once": fault.at_once,
                "false_alarms": fault.false_alarms,
                "cost": dataclasses.asdict(fault.cost),
            }
            for where, fault in results.fault.items()
        },
    }


def _line(line: Line) -> dict[str, Any]:
    values = {name: value if math.isfinite(value) else None for name, value in vars(line.difference).items()}
    words = {"verdict": line.difference.words(line.better)}
    return {"window": line.window, "metric": line.metric, "better": line.better, **values, **words}
