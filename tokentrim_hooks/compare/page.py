"""``compare.html``: one self-contained file with the table, an interval drawn in each cell, and the settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tokentrim_hooks.compare.settings import BASE
from tokentrim_hooks.compare.table import NOTES, Row, by_window, cell, share_heads, shares
from tokentrim_hooks.compare.trials import Column

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .35em .6em; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }
th, td { white-space: nowrap; }
td small { display: block; opacity: .75; }
.better { background: #2a72; } .WORSE { background: #d432; }
svg { display: block; width: 110px; height: 10px; overflow: visible; }
pre { white-space: pre-wrap; }
"""


def render(rows: Sequence[Row], columns: Sequence[Column], made_with: Mapping[str, Any], watch: int | None) -> str:
    """The page as a string; it loads nothing."""
    tables = "".join(_table(rows, some, window, watch) for window, some in by_window(columns).items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>tokentrim compare</title>'
        f"<style>{STYLE}</style></head><body><h1>tokentrim compare</h1>{tables}"
        f"<pre>{escape(NOTES)}</pre><h2>Made with</h2>"
        f"<pre>{escape(json.dumps(made_with, indent=2))}</pre></body></html>\n"
    )


def _table(rows: Sequence[Row], columns: Sequence[Column], window: str, watch: int | None) -> str:
    aspects = "".join(f"<th>{escape(c.aspect)}</th>" for c in columns)
    names = "".join(f"<th>{escape(text)}</th>" for text in ["setting", *share_heads(watch), *(c.name for c in columns)])
    lead = f'<th colspan="{1 + len(share_heads(watch))}"></th>'
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
    return f'{title}<div class="scroll"><table>{head}{body}</table></div>'


def _cell(row: Row, column: Column, scale: float) -> str:
    first, *rest = cell(row, column)
    verdict = rest[-1].rpartition(": ")[2] if rest else ""
    kind = f' class="{verdict}"' if verdict in ("better", "WORSE") else ""
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
