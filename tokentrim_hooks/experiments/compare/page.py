"""``compare.html``: one self-contained file with the table, an interval drawn in each cell, and the settings."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tokentrim_hooks.experiments.compare.settings import BASE
from tokentrim_hooks.experiments.compare.table import NOTES, Row, by_window, cell, share_heads, shares
from tokentrim_hooks.experiments.compare.trials import Column

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 100rem; }
p, h1 { overflow-wrap: break-word; } h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h1 small { display: block; font-weight: normal; font-size: 1rem; opacity: .75; }
p { max-width: 50rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .35em .6em; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }
td { white-space: nowrap; } thead th { min-width: 4em; } thead small { font-weight: normal; }
th:first-child { position: sticky; left: 0; background: Canvas; min-width: 7em; }
small { display: block; opacity: .75; }
.better { background: #2a72; } .worse { background: #d432; }
svg { display: block; width: 110px; height: 10px; overflow: visible; }
summary { cursor: pointer; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
"""
INTRODUCTION = (
    "Every setting against the unpatched model, on the same seeds with the same noise. The bar is the interval, the "
    "dot the mean, the grey line zero; one scale per column. Green: better, red: worse, where p is below 0.05 after "
    "adjusting for all comparisons of this page. On a narrow screen the tables scroll sideways."
)


def render(rows: Sequence[Row], columns: Sequence[Column], made_with: Mapping[str, Any], watch: int | None) -> str:
    """The page as a string; it loads nothing. ``made_with["settings"]`` says what each setting changes."""
    tables = "".join(_table(rows, some, window, watch) for window, some in by_window(columns).items())
    title = escape(", ".join(_about(rows, made_with)))
    rest = {key: value for key, value in made_with.items() if key != "settings"}
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tokentrim compare {title}</title><style>{STYLE}</style></head>"
        f"<body><h1>tokentrim compare <small>{title}</small></h1><p>{INTRODUCTION}</p>{tables}"
        f"<h2>How to read it</h2><p>{escape(NOTES)}</p>{_settings(made_with.get('settings', {}))}"
        f"<details><summary>Made with</summary><pre>{escape(json.dumps(rest, indent=2))}</pre></details>"
        "</body></html>\n"
    )


def _about(rows: Sequence[Row], made_with: Mapping[str, Any]) -> list[str]:
    """What was compared: the target, its chunks and fault if it has such, and how many pairs."""
    trial = made_with.get("trial", {})
    facts = [f"{trial[key]} {word}" for key, word in (("chunks", "chunks"), ("fault", "fault")) if trial.get(key)]
    return [str(made_with.get("target", "")), *facts, f"{max((row.pairs for row in rows), default=0)} pairs"]


def _settings(changes: Mapping[str, str]) -> str:
    """What each setting changes of the paper's constants."""
    if not changes:
        return ""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in changes.items())
    head = "<tr><th>setting</th><th>differs from the paper's constants in</th></tr>"
    return f'<h2>Settings</h2><div class="scroll"><table id="settings"><thead>{head}</thead>{body}</table></div>'


def _table(rows: Sequence[Row], columns: Sequence[Column], window: str, watch: int | None) -> str:
    groups = [(aspect, len(list(some))) for aspect, some in itertools.groupby(columns, key=lambda c: c.aspect)]
    aspects = "".join(f'<th colspan="{count}">{escape(aspect)}</th>' for aspect, count in groups)
    names = "".join(f"<th>{escape(text)}</th>" for text in ["setting", *share_heads(watch)])
    names += "".join(f"<th>{escape(c.name)}<small>{_direction(c)}</small></th>" for c in columns)
    lead = f'<th></th><th colspan="{len(share_heads(watch))}"></th>'
    scales = {c.key: _scale(rows, c) for c in columns}
    body = "".join(
        f"<tr><th>{escape(row.setting)}</th>"
        + "".join(f"<td>{escape(text)}</td>" for text in shares(row, watch))
        + "".join(_cell(row, c, scales[c.key]) for c in columns)
        + "</tr>"
        for row in rows
    )
    title = f"<h2>{escape(window)}</h2>" if window else ""
    head = f"<thead><tr>{lead}{aspects}</tr><tr>{names}</tr></thead>"
    return f'{title}<div class="scroll" tabindex="0"><table>{head}{body}</table></div>'


def _direction(column: Column) -> str:
    return f"{escape(column.better)} is better" if column.better else "neither side is better"


def _cell(row: Row, column: Column, scale: float) -> str:
    first, *rest = cell(row, column)
    verdict = rest[-1] if rest else ""
    kind = f' class="{verdict}"' if verdict in ("better", "worse") else ""
    picture = _picture(row, column, scale) if rest else ""
    return f"<td{kind}>{escape(first)}{picture}" + "".join(f"<small>{escape(text)}</small>" for text in rest) + "</td>"


def _picture(row: Row, column: Column, scale: float) -> str:
    """The interval as a bar, the mean as a dot, zero as a line in the middle; one scale a column."""
    d = row.differences[column.key]
    low, mean, high = (max(-50.0, min(50.0, 50 * value / scale)) for value in (d.low, d.mean, d.high))
    return (
        '<svg viewBox="-50 -5 100 10" role="img" aria-label="interval">'
        '<path d="M0-5V5" stroke="currentColor" stroke-opacity=".4"/>'
        f'<path d="M{low:.1f} 0H{high:.1f}" stroke="currentColor" stroke-width="2"/>'
        f'<circle cx="{mean:.1f}" r="2.5" fill="currentColor"/></svg>'
    )


def _scale(rows: Sequence[Row], column: Column) -> float:
    """Half the width of a column's pictures, in its own units."""
    found = [d for row in rows if row.setting != BASE for d in [row.differences[column.key]]]
    ends = [abs(value) for d in found for value in (d.low, d.high) if math.isfinite(value)]
    return max(ends, default=0.0) or 1.0
