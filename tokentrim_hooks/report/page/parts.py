"""The parts of a page that are drawn: charts and maps of one sample, and two videos beside each other."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokentrim_hooks.metrics.clips import Clip
from tokentrim_hooks.report.page import words
from tokentrim_hooks.report.page.charts import (
    Limits,
    cache_map,
    control_chart,
    drift_map,
    figure_bytes,
    largest_drift,
    map_in_words,
    severity_limits,
)
from tokentrim_hooks.report.page.gathering import MAPS, Run
from tokentrim_hooks.report.page.template import embedded
from tokentrim_hooks.report.record import ChunkRecord
from tokentrim_hooks.report.thumbnails import picture_of

MAPS_OF_ALL = 60
"""Drift maps of a page at most."""
ROWS, ROWS_OF_ALL = 2_000, 10_000
"""Rows of a table of chunks at most, and of all of a page."""
Fetch = Callable[[Sequence[int]], list[ChunkRecord]]
"""Whole records by their places."""


@dataclass(frozen=True)
class Easel:
    """What all samples of a page have in common, so that they can be compared.

    Attributes:
        warmup: chunks of it. limits: of the severity axis. top: the brightest drift.
        maps: by run, the records that get one. rows: of a table. frames: (run's place, record's place) -> picture.
    """

    warmup: int
    limits: Limits | None
    top: float
    maps: tuple[tuple[ChunkRecord, ...], ...]
    rows: int
    clip: Clip | None
    log: Path | None

    @classmethod
    def of(cls, runs: Sequence[Run], fetch: Fetch, warmup: int, clip: Clip | None, log: Path | None) -> Easel:
        """The scales that fit all of ``runs``, and the records that are mapped, read again from the log."""
        each = max(1, min(MAPS, MAPS_OF_ALL // max(len(runs), 1)))
        maps = tuple(tuple(fetch(run.places(each))) for run in runs)
        limits = severity_limits(record for run in runs for record in run.records) if len(runs) > 1 else None
        top = largest_drift(record for some in maps for record in some)
        return cls(warmup, limits, top, maps, min(ROWS, ROWS_OF_ALL // max(len(runs), 1)), clip, log)

    def drawn(self, run: Run, number: int) -> dict[str, Any]:
        """What the template shows of a run, the ``number``-th."""
        maps = self.maps[number]
        decoded = self.clip is not None and is_first(run)
        pictures = self._decoded(run, maps) if decoded else [self._thumbnail(record) for record in maps]
        over = "the decoded frame" if decoded else "the latent's first principal components"
        shown = words.rows(run, self.rows)
        return {
            **named(run),
            "chart": self._both(control_chart, run, self.warmup, limits=self.limits) if run.tally.judged else [],
            "chart_in_words": words.chart_in_words(run),
            "cache": self._both(cache_map, run) if run.tally.pruned else [],
            "maps": [
                {"chunk": record.chunk, "words": map_in_words(record), "picture": self._map(record, picture)}
                for record, picture in zip(maps, pictures, strict=True)
            ],
            "drawn_over": f", also over {over}" if any(picture is not None for picture in pictures) else "",
            "shown": words.shown(run, len(maps)),
            "rows": shown,
            "all_rows": len(run.records),
        }

    def _both(self, draw: Callable[..., Any], run: Run, *arguments: Any, **options: Any) -> list[str]:
        """A chart for a desktop, and for a phone."""
        figures = (draw(run.records, *arguments, narrow=narrow, **options) for narrow in (False, True))
        return [embedded("svg", figure_bytes(figure)) for figure in figures]

    def _map(self, record: ChunkRecord, picture: Any) -> str:
        return embedded("png", figure_bytes(drift_map(record, picture, self.top), "png"))

    def _decoded(self, run: Run, maps: Sequence[ChunkRecord]) -> list[Any]:
        """A frame from the middle of each chunk."""
        assert self.clip is not None, "asked only where there is one"
        count, latents = self.clip.count(), max(1, *(r.start + r.frames for r in run.records))
        moments = [min(int((r.start + r.frames / 2) / latents * count), count - 1) for r in maps]
        picked = self.clip.pick(moments)
        return [picked.get(moment) for moment in moments]

    def _thumbnail(self, record: ChunkRecord) -> Any | None:
        return None if self.log is None else picture_of(record, self.log)


def named(run: Run) -> dict[str, Any]:
    """What the list of contents says of a run."""
    anchor = f"v{run.video}-s{run.sample}"
    return {"video": run.video, "sample": run.sample, "anchor": anchor, "verdict": words.verdict(run.tally)}


def is_first(run: Run) -> bool:
    """Whether it is the first video's first sample: the one that decoded frames are of."""
    return run.video == 0 and run.sample == 0


def strip(runs: Sequence[Run], patched: Clip, unpatched: Clip) -> str:
    """Two videos of the same noise above one another, as an address.

    Raises:
        VideoError: they differ in size or length.
    """
    from tokentrim_hooks.report.filmstrip import unpatched_and_patched, verdicts

    buffer = io.BytesIO()
    records = next((run.records for run in runs if is_first(run)), [])
    unpatched_and_patched(unpatched, patched, verdicts(words.chosen(records, 200))).save(buffer, "png")
    return embedded("png", buffer.getvalue())
