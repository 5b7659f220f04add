"""``tokentrim report``: a run's log as one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from tokentrim_hooks.cli.options import FOLDER, Named, need
from tokentrim_hooks.cli.page import PAGE, page_of
from tokentrim_hooks.console import printable
from tokentrim_hooks.errors import ReportError

VIDEO = Named(dir_okay=False, path_type=Path)
LARGE, PER_SECOND = 200e6, 15e6
"""Bytes of a log from which on it is said how long reading takes, and how many a second are read."""


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--video", type=VIDEO, help="The decoded video of the run, to draw drift maps over.")
@click.option("--unpatched", type=VIDEO, metavar="VIDEO", help="Of the same noise: shows a filmstrip of both.")
@click.option("--what-if", multiple=True, metavar="SETTING", help="One more to ask the log about: 'sensitivity=1.5'.")
@click.option("--unchecked", is_flag=True, help="Take --video also where it does not look like this run's.")
def report(
    folder: Path, video: Path | None, unpatched: Path | None, what_if: Sequence[str], unchecked: bool
) -> None:
    """Render a run's log as one HTML file.

    FOLDER is a run's, with chunks.jsonl in it, or one of its logs.
    """
    if unpatched and not video:
        raise click.UsageError("--unpatched needs --video; add it, with the video of the patched run")
    if not folder.exists():
        raise ReportError(f"no such folder: {folder}; give the folder of a run")
    need(*PAGE, extra="report", metrics=("av",) if video else ())
    if video and not unchecked:
        from tokentrim_hooks.cli.belongs import require_own

        require_own(video, folder)
    _say_how_long(folder)
    click.echo(str(page_of(folder, video, unpatched, what_if)))
    _say_what_else(folder)


def _say_how_long(folder: Path) -> None:
    """A log of gigabytes takes minutes, in which nothing else would be seen."""
    from tokentrim_hooks.report.record import log_in

    log = log_in(folder) if folder.exists() else folder
    size = log.stat().st_size if log.is_file() else 0
    if size >= LARGE:
        words = f"{log} has {size / 1e9:.1f} GB, which takes about {size / PER_SECOND:.0f} seconds to read"
        print(printable(f"tokentrim report: {words}"), file=sys.stderr, flush=True)


def _say_what_else(folder: Path) -> None:
    """Name the logs that are not on the page: those of ranks, forks, other processes and earlier runs."""
    from tokentrim_hooks.report.names import logs_in

    drawn, *others = [log.name for log in logs_in(folder)] if folder.is_dir() else [""]
    if others:
        shown = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        print(f"The page shows {drawn}; there are also {shown}: give one instead of the folder.", file=sys.stderr)
