"""Measures of videos as rows of text: what each is, which way is better, and how two videos differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tokentrim_hooks.metrics.meter import Measures, Meter
from tokentrim_hooks.metrics.trends import Drift

Better = Literal["up", "down", "near 0", "near 1", "-"]
"""Which way is better; "-" where neither is: more motion may be livelier or shakier."""
PER_MINUTE = " per minute"

SHOWN: dict[str, tuple[str, Better]] = {
    "colour_shift": ("colour shift, start to end", "down"),
    "luma_per_minute": ("luma per minute", "near 0"),
    "saturation_per_minute": ("saturation per minute", "near 0"),
    "contrast_per_minute": ("contrast per minute", "near 0"),
    "sharpness_per_minute": ("sharpness per minute", "near 0"),
    "clipped": ("clipped pixels", "down"),
    "clipped_per_minute": ("clipped pixels per minute", "near 0"),
    "flicker": ("steadiness (VBench flicker)", "up"),
    "similarity at lag 20": ("similarity at lag 20", "up"),
    "motion": ("motion, pixels per frame", "-"),
    "motion_per_minute": ("motion per minute", "near 0"),
    "boundary_spike": ("motion at chunk boundaries", "near 1"),
}
"""The rows of a short table, at most twelve: key, words, direction."""

BRACKETS = "Per minute: slope through the means in brackets, of windows of equal length in order of time."
SHORT = "Drift per minute has no row: it takes two seconds of video."
STILL = "Similarity and steadiness mean little without motion: a frozen video has the best of both."
ONE_PAIR = "One pair of videos shows a difference, not an effect: tokentrim compare measures many pairs."


def notes(measured: Mapping[str, Measured]) -> str:
    """What a reader of the table must know."""
    sloped = any(key.endswith("_per_minute") for video in measured.values() for key in video.values)
    return "\n".join([BRACKETS if sloped else SHORT, STILL, *([ONE_PAIR] if len(measured) == 2 else [])])


@dataclass(frozen=True)
class Measured:
    """What is known of one video: its measures by name, flat, and how they drift."""

    values: dict[str, float]
    drifts: dict[str, Drift]

    @classmethod
    def by(cls, meter: Meter) -> Measured:
        """What a meter has measured."""
        return cls(_flat(meter.values()), meter.drifts())

    def as_json(self) -> dict[str, object]:
        """All of it; windows by metric, with their length in seconds."""
        windows = {name: list(drift.windows) for name, drift in self.drifts.items()}
        seconds = next(iter(self.drifts.values())).seconds
        return {**self.values, "windows": windows, "window_seconds": seconds}

    def cell(self, key: str) -> str:
        """The value in words; behind a drift per minute, the windows that made it."""
        value = self.values.get(key)
        if value is None or math.isnan(value):
            return "-"
        drift = self.drifts.get(key.removesuffix("_per_minute")) if key.endswith("_per_minute") else None
        windows = "" if drift is None else f" ({' '.join(f'{mean:.3g}' for mean in drift.windows)})"
        return f"{value:.4g}{windows}"


def table(measured: Mapping[str, Measured], whole: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a column per video, and of two videos how the second differs from the first.

    Args:
        measured: by the video's name. whole: all measures, not only those of ``SHOWN``.
    """
    videos = list(measured.values())
    keys = [key for key in SHOWN if any(key in video.values for video in videos)]
    if whole:
        keys += [key for key in dict.fromkeys(key for video in videos for key in video.values) if key not in SHOWN]
    heads = ["measure", "better", *measured, *(["difference"] if len(videos) == 2 else [])]
    return heads, [_row(key, videos) for key in keys]


def _row(key: str, videos: Sequence[Measured]) -> list[str]:
    words, better = SHOWN.get(key, (key, direction(key)))
    row = [words, better, *(video.cell(key) for video in videos)]
    return [*row, _difference(key, better, videos)] if len(videos) == 2 else row


def direction(key: str) -> Better:
    """Which way is better for any measure."""
    if key in SHOWN:
        return SHOWN[key][1]
    if key.endswith("_drift_abs"):
        return "down"
    if "similarity" in key:
        return "up"
    return "near 0" if "_drift" in key or key.endswith("_per_minute") else "-"


def _difference(key: str, better: Better, videos: Sequence[Measured]) -> str:
    """The second less the first, and whether that is the better way."""
    first, second = (video.values.get(key) for video in videos)
    if first is None or second is None or math.isnan(second - first):
        return "-"
    gain = _goodness(second, better) - _goodness(first, better)
    words = " better" if gain > 0 else " worse" if gain < 0 else ""
    return f"{second - first:+.4g}{words}"


def _goodness(value: float, better: Better) -> float:
    return {"up": value, "down": -value, "near 0": -abs(value), "near 1": -abs(value - 1), "-": 0.0}[better]


def _flat(values: Measures) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found.update({f"similarity at lag {lag}": alike for lag, alike in value.items()})
        else:
            found[name] = value
    return found
