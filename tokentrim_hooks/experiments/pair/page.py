"""``try.html``: both videos in step, the verdict, the curves, the cost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tokentrim_hooks.experiments.pair.charts import Span, curve
from tokentrim_hooks.experiments.pair.curves import UNITS, Curves
from tokentrim_hooks.experiments.pair.words import Pair, headline, sentences
from tokentrim_hooks.extras import require
from tokentrim_hooks.metrics.video import VideoFile
from tokentrim_hooks.metrics.writing import write_video
from tokentrim_hooks.report.files import write
from tokentrim_hooks.report.page.charts import figure_bytes
from tokentrim_hooks.report.page.template import embedded, filled
from tokentrim_hooks.report.record import Report

TEMPLATE = Path(__file__).with_name("pair.html.j2")
PLAYED = {("mp4", "h264", "yuv420p"), ("webm", "vp8", "yuv420p"), ("webm", "vp9", "yuv420p")}
"""Container, codec and pixel format that every browser plays."""


def write_page(
    folder: Path, pair: Pair, videos: Sequence[Path], curves: Sequence[Curves], more: Mapping[str, Any]
) -> Path:
    """Write ``try.html`` into ``folder``, in which the two videos lie; returns the page's path.

    Args:
        videos, curves: of the unpatched and the patched run. more: ``command``, ``again`` (the command over more
            seeds), ``report`` (address of the run's page, or ""), ``others`` (further videos), ``pairs`` (a table).

    Raises:
        VideoError: a video cannot be read. ReportError: something cannot be written.
    """
    without, patched = curves
    spans = spans_of(pair.report, patched)
    drawings = {
        name: [embedded("svg", figure_bytes(curve(name, without, patched, spans, narrow))) for narrow in (False, True)]
        for name in UNITS
    }
    names = ("unpatched.mp4", "patched.mp4")
    played = [playable(path, folder / name) for name, path in zip(names, videos, strict=True)]
    content = filled(
        TEMPLATE,
        headline=headline(pair),
        sentences=sentences(pair),
        videos=[quote(path.relative_to(folder).as_posix()) for path in played],
        marks=[(100 * begin / patched.seconds, 100 * (end - begin) / patched.seconds) for begin, end in spans],
        chunks=pair.pruned,
        drawings=drawings,
        settings=json.dumps(pair.report.settings, indent=2, default=str),
        **more,
    )
    return write(folder / "try.html", content)


def spans_of(report: Report, video: Curves) -> list[Span]:
    """Seconds of the video in which each pruned chunk lies, by its share of the latent frames."""
    records = [r for r in report if (r.video, r.sample) == (0, 0)]
    latents = max((r.start + r.frames for r in records), default=1)
    per_latent = video.seconds / latents
    return [(r.start * per_latent, (r.start + r.frames) * per_latent) for r in records if r.pruned]


def playable(path: Path, place: Path) -> Path:
    """The video itself where every browser plays it, else a copy in H.264 at ``place``, as old as the video.

    Raises:
        VideoError: it cannot be read, or the copy cannot be written.
    """
    video = VideoFile.of(path)
    with require("av", "metrics").open(str(path)) as container:
        stream = container.streams.video[0].codec_context
        kind = (path.suffix.lower().lstrip("."), stream.name.removeprefix("lib"), stream.pix_fmt)
    if kind in PLAYED:
        return path
    write_video(place, video.frames(), video.fps)
    written = path.stat()
    os.utime(place, ns=(written.st_atime_ns, written.st_mtime_ns))  # `tokentrim report` asks when a video was made
    return place
