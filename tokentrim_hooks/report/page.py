"""``report.html``: one self-contained file about a run, readable offline and on a phone."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.extras import require
from tokentrim_hooks.metrics.frames import Frames
from tokentrim_hooks.report import names
from tokentrim_hooks.report.charts import cache_map, control_chart, drift_map, figure_bytes
from tokentrim_hooks.report.files import write
from tokentrim_hooks.report.record import ChunkRecord, Report, log_in, read_report
from tokentrim_hooks.report.thumbnails import picture_of

MAPS = 12
"""Drift maps shown at most for a sample of a video."""

TEMPLATE = Path(__file__).with_name("report.html.j2")

HEADS = (
    *("chunk", "frames", "severity", "mean", "threshold", "accepted"),
    *("tokens", "rows dead", "extra calls", "seconds", "notes"),
)


def write_page(folder: str | Path, frames: Frames | None = None, unpatched: Frames | None = None) -> Path:
    """Render the log of a run as a page beside it; return its path.

    ``folder`` is the run's, whose ``chunks.jsonl`` becomes ``report.html``, or one log in it: ``chunks.rank1.jsonl``
    becomes ``report.rank1.html``. ``frames`` are the decoded frames of the (first) video, if they are at hand: drift
    maps are then drawn over them. ``unpatched`` are those of the same noise without the patch: the two are then shown
    above one another.

    Raises:
        ReportError: no log, or one that cannot be read; the page cannot be written.
        VideoError: ``frames`` and ``unpatched`` differ in size or length.
    """
    log = log_in(Path(folder))
    page = names.page_of(log.parent, names.tag_of(log))
    return write(page, render(read_report(log), log, frames, unpatched))


def render(
    report: Report, log: Path | None = None, frames: Frames | None = None, unpatched: Frames | None = None
) -> str:
    """The page as a string; thumbnails are looked for beside ``log``.

    Raises:
        ReportError: the report has no record.
        VideoError: ``frames`` and ``unpatched`` differ in size or length.
    """
    if not report.records:
        raise ReportError("the report holds no chunk: was the denoiser called, and did it run more than one chunk?")
    return filled(
        TEMPLATE,
        summary=report.summary(),
        settings=json.dumps(report.settings, indent=2, default=str),
        title=_title(report, log),
        heads=HEADS,
        strip=None if frames is None or unpatched is None else _strip(report.records, frames, unpatched),
        runs=[_run(records, report, log, frames) for records in split(report.records)],
    )


def filled(template: Path, **values: Any) -> str:
    """A jinja template with its values, escaped for HTML."""
    environment = require("jinja2", "report").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html: str = environment.from_string(template.read_text(encoding="utf-8")).render(**values)
    return html


def _title(report: Report, log: Path | None) -> str:
    """Model, adapter, policy, probe, and the day on which the log was last written to."""
    parts = [str(report.settings[k]) for k in ("denoiser", "adapter", "policy", "probe") if k in report.settings]
    if log is not None and log.is_file():
        parts.append(datetime.fromtimestamp(log.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    return ", ".join(parts)


def _strip(records: Sequence[ChunkRecord], frames: Frames, unpatched: Frames) -> str:
    from tokentrim_hooks.report.filmstrip import unpatched_and_patched, verdicts

    buffer = io.BytesIO()
    unpatched_and_patched(unpatched, frames, verdicts([r for r in records if _is_first(r)])).save(buffer, "png")
    return _data("png", buffer.getvalue())


def split(records: Sequence[ChunkRecord]) -> list[list[ChunkRecord]]:
    """Records by video and sample, each in order of chunks."""
    groups: dict[tuple[int, int], list[ChunkRecord]] = {}
    for record in sorted(records, key=lambda r: (r.video, r.sample, r.chunk)):
        groups.setdefault((record.video, record.sample), []).append(record)
    return list(groups.values())


def _run(records: list[ChunkRecord], report: Report, log: Path | None, frames: Frames | None) -> dict[str, Any]:
    warmup = _warmup(report)
    mapped = worth_a_map(records)
    pictures = [_picture(r, records, log, frames) for r in mapped]
    decoded = frames is not None and _is_first(records[0])
    below = "the decoded frame" if decoded else "the latent's first principal components"
    maps = zip(mapped, pictures, strict=True)
    judged = any(r.severity is not None for r in records)
    return {
        "video": records[0].video,
        "sample": records[0].sample,
        "anchor": f"v{records[0].video}-s{records[0].sample}",
        "verdict": verdict(records),
        "chart": [_embed(control_chart(records, warmup, narrow)) for narrow in (False, True)] if judged else [],
        "cache": [_embed(cache_map(records, narrow)) for narrow in (False, True)],
        "maps": [{"chunk": r.chunk, "picture": _embed(drift_map(r, picture), "png")} for r, picture in maps],
        "drawn_over": f", also over {below}" if any(picture is not None for picture in pictures) else "",
        "shown": _shown(records, len(mapped)),
        "rows": [{"pruned": r.pruned, "cells": _cells(r)} for r in records],
    }


def _warmup(report: Report) -> int:
    """The warm-up that the settings name; they may hold anything."""
    warmup = report.settings.get("policy.warmup")
    return warmup if type(warmup) is int and warmup > 0 else 0


def verdict(records: Sequence[ChunkRecord]) -> str:
    """One or two sentences: how many chunks were regenerated, which, and how many stayed above the threshold."""
    judged = [r for r in records if r.severity is not None]
    pruned = [r for r in judged if r.pruned]
    if not pruned:
        return f"None of {len(judged)} judged chunks was regenerated." if judged else "No chunk was judged."
    numbers = ", ".join(str(r.chunk) for r in pruned)
    above = sum(r.threshold is not None and (r.accepted_severity or 0) > r.threshold for r in pruned)
    end = f"and {'was' if above == 1 else 'were'} accepted all the same" if above else "after it"
    return (
        f"{len(pruned)} of {len(judged)} judged chunks regenerated: {numbers}. "
        f"{above or 'None'} of these stayed above the threshold {end}."
    )


def worth_a_map(records: Sequence[ChunkRecord]) -> list[ChunkRecord]:
    """The most severe pruned chunks, MAPS at most; where none was pruned the three most severe ones; in order."""
    judged = sorted((r for r in records if r.severity is not None), key=lambda r: -(r.severity or 0))
    chosen = [r for r in judged if r.pruned][:MAPS] or judged[:3]
    return sorted(chosen, key=lambda r: r.chunk)


def _shown(records: Sequence[ChunkRecord], maps: int) -> str:
    pruned = sum(r.pruned and r.severity is not None for r in records)
    if not pruned:
        return "the most severe chunks, for none was pruned"
    return "the pruned chunks" if pruned <= maps else f"the {maps} most severe of {pruned} pruned chunks"


def _is_first(record: ChunkRecord) -> bool:
    """Whether the record is of the first video's first sample: the one that decoded frames are of."""
    return record.video == 0 and record.sample == 0


def _picture(
    record: ChunkRecord, records: Sequence[ChunkRecord], log: Path | None, frames: Frames | None
) -> Any | None:
    """A frame of the chunk: decoded if ``frames`` cover the video, else the latent's thumbnail, else None."""
    latents = max(1, *(r.start + r.frames for r in records))
    if frames is not None and _is_first(record):
        middle = (record.start + record.frames / 2) / latents
        return (255 * frames[min(int(middle * len(frames)), len(frames) - 1)]).astype(np.uint8)
    return None if log is None else picture_of(record, log)


def _embed(figure: Any, kind: str = "svg") -> str:
    return _data(kind, figure_bytes(figure, kind))


def _data(kind: str, content: bytes) -> str:
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


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
