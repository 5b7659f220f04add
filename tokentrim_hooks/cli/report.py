"""``tokentrim report``: a run's log as one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokentrim_hooks.errors import ReportError, TokenTrimError

HELP = "Render a run's log as one HTML file."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim report`` takes."""
    parser.add_argument("folder", type=Path, help="a run's folder, with chunks.jsonl in it, or one of its logs")
    parser.add_argument("--video", type=Path, help="the decoded video of the run, to draw drift maps over")
    parser.add_argument("--unpatched", type=Path, metavar="VIDEO", help="of the same noise: shows a filmstrip of both")


def run(options: argparse.Namespace) -> int:
    """Render a run's folder as one self-contained report.html."""
    if options.unpatched and not options.video:
        raise TokenTrimError("--unpatched needs --video, the decoded video of the patched run")
    print(page_of(options.folder, options.video, options.unpatched))
    _say_what_else(options.folder)
    return 0


def _say_what_else(folder: Path) -> None:
    """Name the logs that are not on the page: those of ranks, forks, other processes and earlier runs."""
    from tokentrim_hooks.report.names import logs_in

    drawn, *others = [log.name for log in logs_in(folder)] if folder.is_dir() else [""]
    if others:
        shown = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        print(f"The page shows {drawn}; there are also {shown}: give one instead of the folder.", file=sys.stderr)


def page_of(folder: Path, video: Path | None = None, unpatched: Path | None = None) -> Path:
    """Write the page of a run's folder, or of one log in it; returns its path.

    Raises:
        ReportError: no such folder, or no log in it that can be read. VideoError: a video cannot be read.
    """
    from tokentrim_hooks.metrics.video import VideoFile
    from tokentrim_hooks.report.page import write_page

    if not folder.exists():
        raise ReportError(f"no such folder: {folder}")
    return write_page(folder, *(None if path is None else VideoFile.of(path) for path in (video, unpatched)))
