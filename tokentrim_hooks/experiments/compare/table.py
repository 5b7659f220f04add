"""A comparison as figures and as rows of text: every setting against the unpatched model, pair by pair."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokentrim_hooks.console import in_markdown, markdown_table
from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.experiments.compare.settings import BASE
from tokentrim_hooks.experiments.compare.store import Outcome
from tokentrim_hooks.experiments.compare.trials import Column
from tokentrim_hooks.metrics.intervals import NOTHING, TOO_FEW, Difference, adjusted, paired_difference

CELL = 16
"""Width of one cell in the terminal."""
ACROSS = 5
"""Measures beside each other in the terminal; more stand in a table below."""
BOLD = "A bold word: p below 0.05 after adjusting for all comparisons of these tables. Without one it is not."
NOTES = """\
Cells: mean difference to the unpatched model over pairs (same seed, same noise), its 95 % t interval, and a verdict
where p is below 0.05 after adjusting for all comparisons here (Benjamini-Hochberg: at most one verdict in twenty is
luck); below 6 pairs there is none. Intervals hold for one cell alone, so one may exclude zero and prove nothing.
In the row of the unpatched model, the mean itself.
Pruned: share of judged chunks that were regenerated. Extra calls: of the denoiser, had every video been rolled out
alone. Read stability, identity and motion together: pruning what moves looks stable and loses the scene."""


@dataclass(frozen=True)
class Row:
    """One setting against the base; ``differences`` by column key.

    ``pruned``, ``extra`` and ``watched`` (pruned at the watched chunk) are shares, NaN for an unpatched model.
    """

    setting: str
    pairs: int
    pruned: float
    extra: float
    watched: float
    differences: dict[str, Difference]


def summarise(outcomes: Sequence[Outcome], columns: Sequence[Column], watch: int | None = None) -> list[Row]:
    """One row per setting, the base first, over the seeds that both have.

    Raises:
        ReportError: no outcome of the unpatched model.
    """
    if not any(outcome.setting == BASE for outcome in outcomes):
        raise ReportError(f"there is no result of the setting {BASE!r} to compare with; run it too")
    names = dict.fromkeys([BASE, *(outcome.setting for outcome in outcomes)])
    base, *rows = [_row(name, outcomes, columns, watch) for name in names]
    return [base, *_adjusted(rows)]


def _adjusted(rows: Sequence[Row]) -> list[Row]:
    """The same rows with differences adjusted for all settings and columns together."""
    differences = iter(adjusted([difference for row in rows for difference in row.differences.values()]))
    return [replace(row, differences={key: next(differences) for key in row.differences}) for row in rows]


def _row(name: str, outcomes: Sequence[Outcome], columns: Sequence[Column], watch: int | None) -> Row:
    mine = [o for o in outcomes if o.setting == name]
    theirs, ours = _by_seed([o for o in outcomes if o.setting == BASE]), _by_seed(mine)
    seeds = sorted(theirs.keys() & ours.keys())
    differences = {
        c.key: paired_difference(*([arm[s].get(c.key, math.nan) for s in seeds] for arm in (theirs, ours)))
        for c in columns
    }
    judged = sum(sum(o.judged) for o in mine)
    pruned = sum(len(chunks) for o in mine for chunks in o.pruned)
    calls = sum(o.calls * len(o.seeds) for o in mine)
    caught = [watch in chunks for o in mine for chunks in o.pruned]
    return Row(
        setting=name,
        pairs=len(seeds),
        pruned=pruned / judged if judged else math.nan,
        extra=sum(sum(o.alone) for o in mine) / calls if calls else math.nan,
        watched=sum(caught) / len(caught) if watch is not None and calls else math.nan,
        differences=differences,
    )


def _by_seed(outcomes: Sequence[Outcome]) -> dict[int, Mapping[str, float]]:
    """Values by seed and column; a seed that was run twice counts once."""
    return {
        seed: {key: column[i] for key, column in outcome.values.items()}
        for outcome in outcomes
        for i, seed in enumerate(outcome.seeds)
    }


def number(value: float, sign: bool = False) -> str:
    """Three decimals, more where they would hide that it is not zero; a dash where there was nothing to measure."""
    if math.isnan(value):
        return "-"
    digits = ".3f" if value == 0 or abs(value) >= 0.0005 else ".0e"
    return f"{value:{'+' if sign else ''}{digits}}"


def percent(share: float) -> str:
    """A share as a percentage with one decimal; a dash where there was nothing to count."""
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def span(difference: Difference) -> str:
    """The interval's ends, signed; a single pair has none."""
    if math.isinf(difference.low) and math.isinf(difference.high):
        return "no interval"
    return f"[{number(difference.low, sign=True)}, {number(difference.high, sign=True)}]"


def by_window(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """Columns of each window, stability before identity before motion, as they were declared within these."""
    order = {"stability": 0, "identity": 1, "motion": 2}
    groups: dict[str, list[Column]] = {}
    for column in sorted(columns, key=lambda c: order.get(c.aspect, 3)):
        groups.setdefault(column.window, []).append(column)
    return {window: groups[window] for window in dict.fromkeys(c.window for c in columns)}


def cell(row: Row, column: Column) -> list[str]:
    """Mean (base) or difference, interval and the verdict in words."""
    d = row.differences[column.key]
    if row.setting == BASE:
        return [number(d.base)]
    if not d.pairs:
        return ["-"]
    return [number(d.mean, sign=True), span(d), d.words(column.better)]


def shares(row: Row, watch: int | None) -> list[str]:
    """Pairs, chunks pruned, extra calls and, where a chunk is watched, how often that one was pruned."""
    values = [row.pruned, row.extra, *([row.watched] if watch is not None else [])]
    return [str(row.pairs), *map(percent, values)]


def share_heads(watch: int | None) -> list[str]:
    """Headings of :func:`shares`."""
    return ["pairs", "pruned", "extra calls", *([f"chunk {watch} pruned"] if watch is not None else [])]


def markdown(rows: Sequence[Row], columns: Sequence[Column], watch: int | None = None) -> str:
    """One table per window, its name above it; a bold word is a verdict (``BOLD``)."""
    tables = []
    for window, some in by_window(columns).items():
        heads = [f"{c.aspect}: {c.name}" if c.aspect else c.name for c in some]
        lines = [[r.setting, *shares(r, watch), *(in_line(cell(r, c)) for c in some)] for r in rows]
        table = markdown_table(["setting", *share_heads(watch), *heads], lines)
        tables.append(f"**{in_markdown(window)}**\n\n{table}\n" if window else f"{table}\n")
    return "\n".join(tables)


def in_line(texts: Sequence[str]) -> str:
    """A cell in one line: a verdict in bold, "too few pairs" plain, nothing where no difference was shown."""
    *numbers, words = texts if len(texts) > 1 else [*texts, ""]
    shown = {"": "", NOTHING: "", TOO_FEW: f" ({TOO_FEW})"}.get(words, f" **{words}**")
    return " ".join(numbers) + shown


def terminal(
    rows: Sequence[Row], columns: Sequence[Column], watch: int | None = None
) -> list[tuple[list[str], list[list[str]]]]:
    """Tables for the terminal, headings and rows: a few measures each, those without a direction left out."""
    tables = []
    for window, some in by_window(columns).items():
        shown = [c for c in some if c.better] or some
        tables += [_stacked(rows, shown[i : i + ACROSS], window, watch) for i in range(0, len(shown), ACROSS)]
    return tables


def _stacked(
    rows: Sequence[Row], columns: Sequence[Column], window: str, watch: int | None
) -> tuple[list[str], list[list[str]]]:
    lines = [[_narrow([window or "all"]), *(_narrow([c.name]) for c in columns)]]
    for row in rows:
        numbers = zip(share_heads(watch), shares(row, watch), strict=True)
        about = [row.setting, *(f"{head} {text}" for head, text in numbers)]
        lines.append([_narrow(about), *(_narrow(cell(row, c)) for c in columns)])
    return ["", *(c.aspect or "measure" for c in columns)], lines


def _narrow(texts: Sequence[str]) -> str:
    """A cell of short lines, and an empty one to keep rows apart."""
    return "\n".join([*(line for text in texts for line in textwrap.wrap(text, CELL)), ""])
