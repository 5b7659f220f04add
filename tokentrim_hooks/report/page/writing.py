"""From a log to its page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.metrics.clips import Clip, clip_of
from tokentrim_hooks.metrics.frames import Frames
from tokentrim_hooks.report import names
from tokentrim_hooks.report.files import write
from tokentrim_hooks.report.page import words
from tokentrim_hooks.report.page.gathering import Gathered, gather
from tokentrim_hooks.report.page.parts import Easel, Fetch, named, strip
from tokentrim_hooks.report.page.template import filled
from tokentrim_hooks.report.record import Report, log_in, records_at, settings_beside, stream
from tokentrim_hooks.report.warm_up import least_of

TEMPLATE = Path(__file__).with_name("report.html.j2")
DRAWN = 24
"""Samples drawn at most."""
LISTED = 200
"""Samples in the list of contents at most."""
SETTINGS = 100_000
"""Characters of settings shown at most."""


@dataclass(frozen=True)
class Section:
    """A table that somebody else adds to the page, such as the answers to what-if questions.

    Attributes:
        anchor: its name in an address. title, words: above the table. heads, rows: text.
    """

    anchor: str
    title: str
    words: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(
    folder: str | Path,
    frames: Frames | Clip | None = None,
    unpatched: Frames | Clip | None = None,
    *,
    sections: Sequence[Section] = (),
) -> Path:
    """Render the log of a run as a page beside it; return its path.

    The log is read record by record: memory depends on the page, which has limits, and not on the log.

    Args:
        folder: the run's, whose ``chunks.jsonl`` becomes ``report.html``, or one log in it: ``chunks.rank1.jsonl``
            becomes ``report.rank1.html``.
        frames: the (first) video, if it is at hand, decoded (``[T, H, W, 3]``) or as a
            :class:`~tokentrim_hooks.metrics.video.VideoFile`: drift maps are then drawn over its frames.
        unpatched: the video of the same noise without the patch: the two are then shown above one another.
        sections: further tables.

    Raises:
        ReportError: no log, or one that cannot be read; the page cannot be written.
        VideoError: ``frames`` and ``unpatched`` differ in size or length, or cannot be read.
    """
    log = log_in(Path(folder))
    settings = settings_beside(log)
    gathered = gather(stream(log, settings))
    html = _html(settings, gathered, lambda places: list(records_at(log, places)), log, frames, unpatched, sections)
    return write(names.page_of(log.parent, names.tag_of(log)), html)


def render(
    report: Report,
    log: Path | None = None,
    frames: Frames | Clip | None = None,
    unpatched: Frames | Clip | None = None,
    *,
    sections: Sequence[Section] = (),
) -> str:
    """The page of a report in memory as a string; thumbnails are looked for beside ``log``.

    Raises:
        ReportError: the report has no record.
        VideoError: ``frames`` and ``unpatched`` differ in size or length, or cannot be read.
    """
    gathered = gather(enumerate(report.records))
    fetch: Fetch = lambda places: [report.records[place] for place in places]  # noqa: E731
    return _html(report.settings, gathered, fetch, log, frames, unpatched, sections)


def _html(
    settings: Mapping[str, Any],
    gathered: Gathered,
    fetch: Fetch,
    log: Path | None,
    frames: Frames | Clip | None,
    unpatched: Frames | Clip | None,
    sections: Sequence[Section],
) -> str:
    if not gathered.runs:
        where = "the report" if log is None else log
        raise ReportError(f"{where} holds no chunk; see that the denoiser is called, for more than one chunk")
    clip = None if frames is None else clip_of(frames)
    drawn = gathered.runs[:DRAWN]
    easel = Easel.of(drawn, fetch, least_of(settings), clip, log)
    text = json.dumps(settings, indent=2, default=str)
    return filled(
        TEMPLATE,
        title=_title(settings, log),
        headline=words.headline(gathered, settings),
        figures=words.figures(gathered),
        left_out=words.left_out(gathered, len(drawn)),
        settings=text if len(text) <= SETTINGS else f"{text[:SETTINGS]}\n... cut off here: see settings.json",
        heads=words.HEADS,
        strip=None if clip is None or unpatched is None else strip(drawn, clip, clip_of(unpatched)),
        runs=[easel.drawn(run, number) for number, run in enumerate(drawn)],
        opened=next((number for number, run in enumerate(drawn) if run.tally.pruned), 0),
        others=[named(run) for run in gathered.runs[DRAWN:LISTED]],
        sections=sections,
    )


def _title(settings: Mapping[str, Any], log: Path | None) -> str:
    """Model, adapter, policy, probe, and the day on which the log was last written to."""
    parts = [str(settings[key])[:200] for key in ("denoiser", "adapter", "policy", "probe") if key in settings]
    if log is not None and log.is_file():
        parts.append(datetime.fromtimestamp(log.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    return ", ".join(parts)
