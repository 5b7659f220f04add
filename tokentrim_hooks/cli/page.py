"""The page of a run, which ``tokentrim report`` writes when it is asked to and ``tokentrim run`` at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAGE = ("jinja2", "matplotlib", "numpy", "PIL")
"""Libraries that it takes."""


def page_of(
    folder: Path, video: Path | None = None, unpatched: Path | None = None, what_if: Sequence[str] = ()
) -> Path:
    """Write the page of a run's folder, or of one log in it; returns its path. Takes what is named in ``PAGE``.

    Args:
        folder: the run's, or a log. video, unpatched: decoded videos. what_if: further settings to ask the log about.

    Raises:
        ReportError: no log in it that can be read. VideoError: a video cannot be read.
        TokenTrimError: a setting that is none.
    """
    from tokentrim_hooks.experiments.what_if.answers import section
    from tokentrim_hooks.metrics.video import VideoFile
    from tokentrim_hooks.report.page import write_page

    clips = [None if path is None else VideoFile.of(path) for path in (video, unpatched)]
    return write_page(folder, *clips, sections=[section(folder, what_if)])
