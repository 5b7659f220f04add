"""``tokentrim report``: a run's log as one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokentrim_hooks.errors import ReportError, TokenTrimError

HELP = "Render a run's log as one HTML file."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim report`` takes."""
    parser.add_argument("folder", type=Path, help="a run's folder, with chunks.jsonl in it; a crashed run will do")
    parser.add_argument("--video", type=Path, help="the decoded video of the run, to draw drift maps over")
    parser.add_argument("--unpatched", type=Path, metavar="VIDEO", help="of the same noise: shows a filmstrip of both")


def run(options: argparse.Namespace) -> int:
    """Render a run's folder as one self-contained report.html."""
    if options.unpatched and not options.video:
        raise TokenTrimError("--unpatched needs --video, the decoded video of the patched run")
    print(page_of(options.folder, options.video, options.unpatched))
    return 0


def page_of(folder: Path, video: Path | None = None, unpatched: Path | None = None) -> Path:
    """Write the page of a run's folder; returns its path."""
    from tokentrim_hooks.metrics.video import read_video
    from tokentrim_hooks.report.page import write_page

    if not folder.is_dir():
        raise ReportError(f"no such folder: {folder}")
    return write_page(folder, *(None if path is None else read_video(path)[0] for path in (video, unpatched)))
