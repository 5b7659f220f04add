"""What must be found in a log, taken from the report's records without the package under test."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

RED = (214, 40, 57)
SIDE = 8
NAMES = ("severity", "threshold", "accepted_severity", "pruned_tokens", "dead_rows", "extra_calls", "seconds")


def curves(records: Iterable[Any]) -> dict[tuple[str, str, int], Any]:
    """``{(figure, series, chunk): value}``, absent where the record says None."""
    found = {}
    for r in records:
        pruned = len(r.tokens) if r.pruned else 0
        values = (r.severity, r.threshold, r.accepted_severity, pruned, r.dead, r.extra_calls, r.seconds)
        for name, value in zip(NAMES, values, strict=True):
            if value is not None:
                found[name, f"v{r.video}-s{r.sample}", r.chunk] = pytest.approx(value, rel=1e-6)
    return found


def check_drift(record: Any, pixels: Sequence[Any]) -> None:
    """A picture ``[height][width]`` of (red, green, blue) shows the record's drift and its pruned tokens."""
    height, width = record.grid
    assert (len(pixels), len(pixels[0])) == (height * SIDE, width * SIDE)
    top = max(record.drift)
    for token, drift in enumerate(record.drift):
        y, x = divmod(token, width)
        corners = {tuple(pixels[y * SIDE + dy][x * SIDE + dx]) for dy in (0, SIDE - 1) for dx in (0, SIDE - 1)}
        (colour,) = corners
        if record.pruned and token in record.tokens:
            assert colour == RED
        else:
            assert colour[0] == colour[1] == colour[2] and abs(colour[0] - 255 * drift / top) <= 1


def pictures(records: Iterable[Any]) -> dict[tuple[str, int], Any]:
    """Records that have a drift picture, by (series, chunk)."""
    return {(f"v{r.video}-s{r.sample}", r.chunk): r for r in records if r.drift}


def clean_environment() -> dict[str, str]:
    """Without what this machine's user has set for W&B."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


def only(paths: Iterable[Path]) -> Path:
    """The one path that there is."""
    (path,) = paths
    return path
