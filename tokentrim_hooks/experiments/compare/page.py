"""``compare.html``: one self-contained file with the table, an interval drawn in each cell, and the settings."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokentrim_hooks.experiments.compare.settings import BASE
from tokentrim_hooks.experiments.compare.table import NOTES, Row, by_window, cell, share_heads, shares
from tokentrim_hooks.experiments.compare.trials import Column
from tokentrim_hooks.report.page import filled

TEMPLATE = Path(__file__).with_name("compare.html.j2")


def render(rows: Sequence[Row], columns: Sequence[Column], made_with: Mapping[str, Any], watch: int | None) -> str:
    """The page as a string; it loads nothing. ``made_with["settings"]`` says what each setting changes."""
    return filled(
        TEMPLATE,
        title=", ".join(_about(rows, made_with)),
        share_heads=share_heads(watch),
        tables=[_table(rows, some, window, watch) for window, some in by_window(columns).items()],
        notes=NOTES,
        settings=made_with.get("settings", {}),
        made_with=json.dumps({key: value for key, value in made_with.items() if key != "settings"}, indent=2),
    )


def _about(rows: Sequence[Row], made_with: Mapping[str, Any]) -> list[str]:
    """What was compared: the target, its chunks and fault if it has such, and how many pairs."""
    trial = made_with.get("trial", {})
    facts = [f"{trial[key]} {word}" for key, word in (("chunks", "chunks"), ("fault", "fault")) if trial.get(key)]
    return [str(made_with.get("target", "")), *facts, f"{max((row.pairs for row in rows), default=0)} pairs"]


def _table(rows: Sequence[Row], columns: Sequence[Column], window: str, watch: int | None) -> dict[str, Any]:
    scales = {c.key: _scale(rows, c) for c in columns}
    lines = [
        {"setting": r.setting, "shares": shares(r, watch), "cells": [_cell(r, c, scales[c.key]) for c in columns]}
        for r in rows
    ]
    aspects = [(aspect, len(list(some))) for aspect, some in itertools.groupby(columns, key=lambda c: c.aspect)]
    return {"window": window, "aspects": aspects, "columns": columns, "rows": lines}


def _cell(row: Row, column: Column, scale: float) -> dict[str, Any]:
    """The texts of a cell, and the ends and the mean of its interval from -50 to 50, zero in the middle."""
    mean, *rest = cell(row, column)
    d = row.differences[column.key]
    ends = [f"{max(-50.0, min(50.0, 50 * value / scale)):.1f}" for value in (d.low, d.mean, d.high)] if rest else []
    return {"mean": mean, "rest": rest, "verdict": rest[-1] if rest else "", "ends": ends}


def _scale(rows: Sequence[Row], column: Column) -> float:
    """Half the width of a column's pictures, in its own units: one scale per column."""
    found = [row.differences[column.key] for row in rows if row.setting != BASE]
    ends = [abs(value) for d in found for value in (d.low, d.high) if math.isfinite(value)]
    return max(ends, default=0.0) or 1.0
