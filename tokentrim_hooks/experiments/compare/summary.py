"""Several kinds of drift in one table: per setting and kind the effect, the price and the cost."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokentrim_hooks.console import in_markdown, markdown_table
from tokentrim_hooks.experiments.compare.settings import BASE
from tokentrim_hooks.experiments.compare.store import Outcome
from tokentrim_hooks.experiments.compare.table import (
    BOLD,
    NOTES,
    Row,
    by_window,
    cell,
    in_line,
    markdown,
    number,
    percent,
    summarise,
)
from tokentrim_hooks.experiments.compare.trials import Column
from tokentrim_hooks.metrics.intervals import TOO_FEW

EFFECTS = {"sprites alive (identity)": "late identity", "background error": "late background"}
"""Measures that stand for the effect, and their names in the summary."""
ACROSS = 32
"""Width of words in the terminal."""
ONE_BATCH = "seconds not told by one batch"
NOTHING_WORSE = "nothing shown to be worse"
ABOUT = """\
Effect: sprites alive (higher is better) and background error (lower is better) in the last chunks, as in the tables
below. Price: all measures, early and late, that got the verdict worse, each with its mean difference and the unpatched
model's value. Cost: further denoiser calls, had every video been rolled out alone, and wall clock relative to the
unpatched rollouts of the same seeds in this run (median of its batches, the first left out: it starts cold), as of this
machine and no other, nor of two if it was resumed on another. Verdicts are adjusted for all comparisons within the
tables of one kind, not across kinds."""


@dataclass(frozen=True)
class Part:
    """The comparison on one kind of drift.

    Attributes:
        kind: its name.
        rows, columns, watch: its table.
        slower: by setting, seconds relative to the unpatched model's.
        made_with: of its store.
    """

    kind: str
    rows: list[Row]
    columns: Sequence[Column]
    watch: int | None
    slower: Mapping[str, float]
    made_with: Mapping[str, Any]

    @classmethod
    def of(cls, kind: str, outcomes: Sequence[Outcome], trial: Any, made_with: Mapping[str, Any]) -> Part:
        """From what a store holds and the trial that was run; raises as :func:`summarise`."""
        watch = getattr(trial, "watch", None)
        rows = summarise(outcomes, trial.columns, watch)
        return cls(kind, rows, trial.columns, watch, slower(outcomes), made_with)

    @property
    def effects(self) -> list[Column]:
        """The columns of the last window that stand for the effect."""
        windows = [column.window for column in self.columns if column.name in EFFECTS]
        last = [column for column in self.columns if column.window in windows[-1:]]
        return [column for name in EFFECTS for column in last if column.name == name]

    def row(self, setting: str) -> Row | None:
        """Of a setting; None where this kind has none of it."""
        return next((row for row in self.rows if row.setting == setting), None)


def slower(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Seconds of each setting relative to the unpatched model's, over batches that both have; the median of them.

    The first batch is left out: the unpatched model opens it, and what torch does once falls upon it alone.
    """
    base = {tuple(o.seeds): o.seconds for o in outcomes if o.setting == BASE}
    ratios: dict[str, list[float]] = {}
    for o in outcomes:
        if base.get(tuple(o.seeds), 0.0) > 0:
            ratios.setdefault(o.setting, []).append(o.seconds / base[tuple(o.seeds)])
    return {setting: statistics.median(found[1:]) for setting, found in ratios.items() if found[1:]}


def settings_of(parts: Sequence[Part]) -> list[str]:
    """All settings of all kinds, in the order in which they first appear."""
    return list(dict.fromkeys(row.setting for part in parts for row in part.rows))


def price(row: Row, columns: Sequence[Column]) -> str:
    """What got worse, by window, in words."""
    if row.setting == BASE:
        return ""
    found = []
    for window, some in by_window(columns).items():
        worse = [_amount(row, c) for c in some if row.differences[c.key].verdict(c.better) == "worse"]
        found += [f"{window}: {', '.join(worse)}" if window else ", ".join(worse)] if worse else []
    tested = any(difference.tested for difference in row.differences.values())
    return "; ".join(found) or (NOTHING_WORSE if tested else TOO_FEW)


def _amount(row: Row, column: Column) -> str:
    d = row.differences[column.key]
    return f"{column.name} {number(d.mean, sign=True)} of {number(d.base)}"


def cost(row: Row, ratio: float | None) -> str:
    """Further calls of the denoiser, where it was patched, and relative seconds."""
    calls = [] if row.extra != row.extra else [f"{percent(row.extra)} more calls"]
    return ", ".join([*calls, *([ONE_BATCH if ratio is None else f"{ratio:.2f}x the seconds"])])


def heads(part: Part) -> list[str]:
    """Headings of :func:`texts`."""
    return [*(EFFECTS[column.name] for column in part.effects), "price", "cost (this machine)"]


def texts(part: Part, setting: str) -> list[str]:
    """A setting on one kind: its effects, price and cost; dashes where this kind has none of it."""
    row = part.row(setting)
    if row is None:
        return ["-"] * len(heads(part))
    effects = [in_line(cell(row, column)) for column in part.effects]
    return [*effects, price(row, part.columns), cost(row, part.slower.get(setting))]


def in_words(parts: Sequence[Part]) -> str:
    """``table.md``: the summary, a row per setting, and behind it the tables of each kind."""
    top = ["setting", *(f"{part.kind}: {head}" for part in parts for head in heads(part))]
    lines = [[setting, *(text for part in parts for text in texts(part, setting))] for setting in settings_of(parts)]
    tables = [f"## {in_markdown(p.kind)}\n\n{markdown(p.rows, p.columns, p.watch)}" for p in parts]
    return "\n".join([f"{markdown_table(top, lines)}\n\n{ABOUT}\n", *tables, f"{BOLD}\n{NOTES}\n"])


def stacked(part: Part) -> tuple[list[str], list[list[str]]]:
    """The summary of one kind for the terminal, headings and rows: verdicts plain, long words in several lines."""
    lines = []
    for row in part.rows:
        effects = ["\n".join(cell(row, column)) for column in part.effects]
        words = (price(row, part.columns), cost(row, part.slower.get(row.setting)))
        lines.append([row.setting, *effects, *("\n".join(textwrap.wrap(text, ACROSS)) for text in words)])
    return [part.kind, *heads(part)], lines
