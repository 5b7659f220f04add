"""What is measured of a pair's videos: four curves over time, and how far apart the pixels are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from tokentrim_hooks.experiments.compare.trials import Column
from tokentrim_hooks.metrics.frames import Array
from tokentrim_hooks.metrics.meter import metered
from tokentrim_hooks.metrics.metrics import shift_of
from tokentrim_hooks.metrics.trends import start_end
from tokentrim_hooks.metrics.video import VideoFile

LEVELS = 255
SHARE = 0.15
"""Of a video, for its beginning and its end (FramePack's measure of drift)."""

UNITS = {
    "colour": "distance of the mean colour from the beginning's (CIE76)",
    "sharpness": "variance of the Laplacian",
    "motion": "optical flow, pixels per frame",
    "flicker": "mean change of a pixel per frame, of 255 levels",
}
COLUMNS = (
    Column("colour drift", "stability", "lower"),
    Column("sharpness drift", "stability", "lower"),
    Column("flicker", "stability", "lower"),
    Column("motion", "motion"),
)
"""What is compared over several pairs. Motion has no direction of its own: a still video drifts little."""


@dataclass(frozen=True)
class Curves:
    """A video's curves by name (``UNITS``): one number per frame, for motion and flicker one per step.

    Attributes:
        fps: frames per second. frames: their number. series: the curves. colours: mean CIELAB per frame ``[T, 3]``.
    """

    fps: float
    frames: int
    series: Mapping[str, Array]
    colours: Array

    @classmethod
    def of(cls, path: Path) -> Curves:
        """Measure a video while it is read.

        Raises:
            VideoError: it cannot be read, or holds no frame.
        """
        video = VideoFile.of(path)
        meter = metered(video.frames(), video.fps)
        found = {name: np.array(values) for name, values in meter.series.items()}
        colours = np.stack([found[name] for name in "Lab"], axis=-1)
        begin = colours[: max(1, round(SHARE * len(colours)))].mean(axis=0)
        series = {
            "colour": np.linalg.norm(colours - begin, axis=-1),
            "sharpness": found["sharpness"],
            "motion": found["motion"],
            "flicker": LEVELS * found["change"],
        }
        return cls(video.fps, len(colours), series, colours)

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.frames / self.fps

    def values(self) -> dict[str, float]:
        """One number for each of ``COLUMNS``; those of steps are 0 for a single frame."""
        return {
            "colour drift": shift_of(self.colours, SHARE),
            "sharpness drift": start_end(self.series["sharpness"], SHARE).absolute,
            "flicker": _mean(self.series["flicker"]),
            "motion": _mean(self.series["motion"]),
        }


def _mean(series: Array) -> float:
    return float(series.mean()) if len(series) else 0.0


def apart(one: Path, other: Path) -> float | None:
    """Mean difference of two videos' pixels in levels of 255, 0 where they are the same; None if they differ in size.

    Raises:
        VideoError: one cannot be read.
    """
    total, count = 0.0, 0
    for mine, theirs in zip_longest(VideoFile.of(one).frames(), VideoFile.of(other).frames()):
        if mine is None or theirs is None or mine.shape != theirs.shape:
            return None
        total += float(np.abs(mine.astype(np.int16) - theirs).mean())
        count += 1
    return total / count if count else None
