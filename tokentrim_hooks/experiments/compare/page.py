"""``compare.html``: one self-contained file with the table, an interval drawn in each cell, and the settings."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokentrim_hooks.experiments.compare.settings import BASE
from tokentrim_hooks.experiments.compare.summary import ABOUT, Part, heads, settings_of, texts
from tokentrim_hooks.experiments.compare.table import NOTES, Row, by_window, cell, share_heads, shares
from tokentrim_hooks.experiments.compare.trials import Column
from tokentrim_hooks.report.page import filled

TEMPLATE = Path(__file__).with_name("compare.html.j2")


def render(rows: Sequence[Row], columns: Sequence[Column], made_with: Mapping[str, Any], watch: int | None) -> str:
    """The page as a string; it loads nothing. ``made_with["settings"]`` says what each setting changes."""
    return filled(
        TEMPLATE,
        title=", ".join(_about(rows, made_with)),
        sections=[_section("", rows, columns, watch)],
        notes=NOTES,
        settings=made_with.get("settings", {}),
        made_with=json.dumps({key: value for key, value in made_with.items() if key != "settings"}, indent=2),
    )


def render_kinds(parts: Sequence[Part], settings: Mapping[str, str]) -> str:
    """One page of several kinds: the summary, then the tables of each; ``settings`` as in :func:`render`."""
    about = _about([row for part in parts for row in part.rows], parts[0].made_with)
    return filled(
        TEMPLATE,
        title=", ".join([*about, *(part.kind for part in parts)]),
        summary=_summary(parts),
        about=ABOUT,
        sections=[_section(part.kind, part.rows, part.columns, part.watch) for part in parts],
        notes=NOTES,
        settings=settings,
        made_with=json.dumps({part.kind: part.made_with for part in parts}, indent=2),
    )


def _section(name: str, rows: Sequence[Row], columns: Sequence[Column], watch: int | None) -> dict[str, Any]:
    tables = [_table(rows, some, window, watch) for window, some in by_window(columns).items()]
    return {"name": name, "share_heads": share_heads(watch), "tables": tables}


def _summary(parts: Sequence[Part]) -> dict[str, Any]:
    """Kinds with their headings, and a line per setting: for each kind the cells of its effects, its price and cost."""
    kinds = [(part.kind, heads(part)) for part in parts]
    lines = [(setting, [cell for part in parts for cell in _cells(part, setting)]) for setting in settings_of(parts)]
    return {"kinds": kinds, "lines": lines}


def _cells(part: Part, setting: str) -> list[dict[str, Any]]:
    row, words = part.row(setting), texts(part, setting)
    plain = [{"mean": "", "rest": [text], "verdict": "", "ends": [], "wide": True} for text in words]
    if row is None:
        return plain
    effects = [_cell(row, column, _scale(part.rows, column)) for column in part.effects]
    return effects + plain[len(effects) :]


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
