"""``report.html``: one self-contained file about a run, readable offline and on a phone."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.extras import require
from tokentrim_hooks.metrics import Frames
from tokentrim_hooks.pictures import cache_map, control_chart, drift_map, figure_bytes
from tokentrim_hooks.report import ChunkRecord, Report, read_report
from tokentrim_hooks.thumbnails import thumbnail_name

MAPS = 12
"""Drift maps shown at most: of the pruned chunks, else of the most severe ones."""

TEMPLATE = Path(__file__).with_name("report.html.j2")

HEADS = (
    *("chunk", "frames", "severity", "mean", "threshold", "accepted"),
    *("tokens", "rows dead", "extra calls", "s", "notes"),
)


def write_page(folder: str | Path, frames: Frames | None = None) -> Path:
    """Render ``folder/chunks.jsonl`` as ``folder/report.html``; return its path.

    ``frames`` are the decoded frames of the (first) video, if they are at hand: drift maps are then drawn over them.
    """
    path = Path(folder)
    report = read_report(path)
    page = path / "report.html"
    page.write_text(render(report, path, frames), encoding="utf-8")
    return page


def render(report: Report, folder: Path | None = None, frames: Frames | None = None) -> str:
    """The page as a string; thumbnails are looked for in ``folder``.

    Raises:
        ReportError: the report has no record.
    """
    if not report.records:
        raise ReportError("the report holds no chunk: was the denoiser called, and did it run more than one chunk?")
    environment = require("jinja2", "report").Environment(autoescape=True)
    html: str = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        summary=report.summary(),
        settings=json.dumps(report.settings, indent=2, default=str),
        heads=HEADS,
        runs=[_run(records, report, folder, frames) for records in split(report.records)],
    )
    return html


def split(records: Sequence[ChunkRecord]) -> list[list[ChunkRecord]]:
    """Records by video and sample, each in order of chunks."""
    groups: dict[tuple[int, int], list[ChunkRecord]] = {}
    for record in sorted(records, key=lambda r: (r.video, r.sample, r.chunk)):
        groups.setdefault((record.video, record.sample), []).append(record)
    return list(groups.values())


def _run(records: list[ChunkRecord], report: Report, folder: Path | None, frames: Frames | None) -> dict[str, Any]:
    warmup = int(report.settings.get("policy.warmup", 0) or 0)
    return {
        "video": records[0].video,
        "sample": records[0].sample,
        "chart": _embed(control_chart(records, warmup)),
        "cache": _embed(cache_map(records)),
        "maps": [_embed(drift_map(r, _picture(r, records, folder, frames)), "png") for r in worth_a_map(records)],
        "rows": [{"pruned": r.pruned, "cells": _cells(r)} for r in records],
    }


def worth_a_map(records: Sequence[ChunkRecord]) -> list[ChunkRecord]:
    """The pruned chunks, or where there are none the three most severe ones; at most MAPS, in order."""
    judged = [r for r in records if r.severity is not None]
    pruned = [r for r in judged if r.pruned]
    chosen = pruned[:MAPS] or sorted(judged, key=lambda r: -(r.severity or 0))[:3]
    return sorted(chosen, key=lambda r: r.chunk)


def _picture(
    record: ChunkRecord, records: Sequence[ChunkRecord], folder: Path | None, frames: Frames | None
) -> Any | None:
    """A frame of the chunk: decoded if ``frames`` cover the video, else the latent's thumbnail, else None."""
    latents = max(r.start + r.frames for r in records)
    if frames is not None and record.video == 0 and record.sample == 0:
        middle = (record.start + record.frames / 2) / latents
        return (255 * frames[min(int(middle * len(frames)), len(frames) - 1)]).astype(np.uint8)
    path = None if folder is None else folder / "thumbs" / thumbnail_name(record)
    if path is None or not path.is_file():
        return None
    return np.asarray(require("PIL.Image", "report").open(path).convert("RGB"))


def _embed(figure: Any, kind: str = "svg") -> str:
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(figure_bytes(figure, kind)).decode()}"


def _cells(record: ChunkRecord) -> list[str]:
    numbers = (record.severity, record.mean, record.threshold, record.accepted_severity)
    return [
        str(record.chunk),
        f"{record.start}-{record.start + record.frames - 1}",
        *("" if value is None else f"{value:.4g}" for value in numbers),
        str(len(record.tokens)) if record.pruned else "",
        str(record.dead or ""),
        str(record.extra_calls or ""),
        f"{record.seconds:.2f}",
        "; ".join((*(("given",) if record.given else ()), *record.notes)),
    ]
