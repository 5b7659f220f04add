"""Whether a video is a run's: by when it was written, by its frames, by its shape."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tokentrim_hooks.cli.script.folders import times_of
from tokentrim_hooks.console import printable
from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.extras import require
from tokentrim_hooks.metrics.video import unreadable
from tokentrim_hooks.report.record import log_in, stream

AFTERWARDS = 2.0
"""Seconds by which clocks of two file systems may differ."""


def require_own(video: Path, place: Path) -> None:
    """Refuse a video that cannot be the run's; say so where it looks as if it were not.

    Args:
        video: the file. place: the run's folder, or one log in it.

    Raises:
        VideoError: it was written before the run began, has fewer frames than the run's latents, or another shape.
        ReportError: there is no log, or it cannot be read.
    """
    log = log_in(place)
    written = video.stat().st_mtime if video.exists() else time.time()
    began, ended = times_of(log.parent)
    if began is not None and written < began - AFTERWARDS:
        _refuse(video, "it was written before the run began")
    _compare(video, log)
    if ended is not None and written > ended + AFTERWARDS:
        words = f"{video} was written {_ago(written - ended)} after the run had ended: is it this run's?"
        print(printable(f"tokentrim report: {words}"), file=sys.stderr)


def _compare(video: Path, log: Path) -> None:
    """Hold frames and shape against latent frames and the token grid."""
    frames, height, width = _size(video)
    latents, rows, columns = _latents(log)
    if 0 < frames < latents:
        _refuse(video, f"it has {frames} frames, fewer than the {latents} latent frames of the run")
    if rows and columns:
        expected, found = columns / rows, width / height
        if abs(found / expected - 1) > 1 / min(rows, columns) + 0.05:
            _refuse(video, f"it is {width} x {height}, while the run's tokens are {columns} x {rows}")


def _latents(log: Path) -> tuple[int, int, int]:
    """Latent frames of the first video, rows and columns of its tokens; the log is read line by line."""
    latents, grid = 0, (0, 0)
    for _, record in stream(log):
        if record.video == 0 and record.sample == 0:
            latents, grid = max(latents, record.start + record.frames), max(grid, record.grid)
    return latents, *grid


def _size(video: Path) -> tuple[int, int, int]:
    """Frames (0 where the file does not say), height and width."""
    av = require("av", "metrics")
    if not video.is_file():
        raise VideoError(f"no such video: {video}; give the path of a file")
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            return int(stream.frames), int(stream.height), int(stream.width)
    except (av.error.FFmpegError, IndexError, ValueError) as failure:
        raise unreadable(video, failure) from failure


def _refuse(video: Path, why: str) -> None:
    raise VideoError(f"{video} is not of this run: {why}.\nGive the run's own video, or add --unchecked.")


def _ago(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
