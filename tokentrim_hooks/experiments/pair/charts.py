"""The four curves of a pair over time, with their difference, and the chunks that were pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokentrim_hooks.experiments.pair.curves import UNITS, Curves
from tokentrim_hooks.extras import require

WITHOUT, WITH, CUT = "#20242c", "#1d6fd0", "#d62839"
POINTS = 1500
"""Points of a curve at most."""
ROUNDING = 1e-9
"""Of a curve's largest value: what is drawn as no difference."""
Span = tuple[float, float]


def curve(name: str, unpatched: Curves, patched: Curves, pruned: Sequence[Span], narrow: bool = False) -> Any:
    """A matplotlib Figure: both curves above their difference, seconds to the right; pruned chunks shaded red.

    Args:
        name: one of ``UNITS``. pruned: (begin, end) of each pruned chunk in seconds. narrow: for a phone.
    """
    figure = require("matplotlib.figure", "report").Figure(figsize=(4.4, 3.6) if narrow else (9, 3.2),
                                                           layout="constrained")  # fmt: skip
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    first = unpatched.frames - len(unpatched.series[name])  # a step stands at the frame that it leads to
    for label, video, colour in (("without the patch", unpatched, WITHOUT), ("with it", patched, WITH)):
        above.plot(*_thin(video.series[name], video.fps, first), color=colour, lw=1.3, label=label)
    shared = min(len(unpatched.series[name]), len(patched.series[name]))
    difference = _apart(patched.series[name][:shared], unpatched.series[name][:shared])
    below.plot(*_thin(difference, unpatched.fps, first), color=WITH, lw=1.1)
    below.axhline(0, color=WITHOUT, lw=0.6)
    for axes in (above, below):
        for number, (begin, end) in enumerate(pruned):
            axes.axvspan(begin, end, color=CUT, alpha=0.2, lw=0, label=None if number else "chunk pruned")
    above.set_title(f"{name}: {UNITS[name]}", loc="left", fontsize=9, wrap=True)
    below.set_ylabel("difference", fontsize=8)
    below.set_xlabel("seconds")
    figure.legend(handles=above.get_legend_handles_labels()[0], loc="outside upper left", ncols=3, fontsize=8,
                  frameon=False)  # fmt: skip
    return figure


def _apart(one: Any, other: Any) -> Any:
    """The difference of two series; what is rounding is none: the same video measures the same only to some digits."""
    difference = np.asarray(one) - np.asarray(other)
    largest = np.abs(np.concatenate([one, other])).max(initial=0.0)
    return np.where(np.abs(difference) > ROUNDING * largest, difference, 0.0)


def _thin(series: Any, fps: float, first: int) -> tuple[Any, Any]:
    """Seconds and values of a curve that begins at frame ``first``; means of neighbours where there are many."""
    values = np.asarray(series, dtype=float)
    seconds = (np.arange(len(values)) + first) / fps
    if len(values) <= POINTS:
        return seconds, values
    parts = [np.array_split(part, POINTS) for part in (seconds, values)]
    return tuple(np.array([piece.mean() for piece in pieces]) for pieces in parts)  # type: ignore[return-value]
