"""docs/pictures/growth.png and the table beside it: how what we add to a chunk grows with everything that can grow.

``python tools/growth.py`` measures (some minutes on one core), draws, and prints the table of docs/performance.md. The
model is blank: its layers keep a cache as Self-Forcing's do and compute nothing, so that what is left is ours. Times
are CPU time of one thread, patched less unpatched, in turns within one process. The C library's allocator asks the
system anew for each piece above 32 MiB, which costs five times what the copy into it does; so that it is not measured
here, run it as ``MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000 python tools/growth.py``.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from blank_model import FRAMES, STEPS, Blank
from PIL import Image

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing.policies import ForcedPolicy

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "growth.png"
WARM = 4
"""Chunks before the clock counts."""
SHARE, EVERY = 0.1, 20
"""Of the tokens, dead in the arm that prunes; and how often it prunes in a long video."""
INK, CUT = "#20242c", "#d62839"


@dataclass(frozen=True)
class Size:
    """A blank model and its video. ``tokens`` are those of a frame, ``window`` the frames that attention sees."""

    tokens: int = 1024
    layers: int = 2
    window: int = 21
    batch: int = 1
    dead: float = SHARE
    chunks: int = 9
    rolls: bool = False
    heads: int = 4
    width: int = 16


def blank(size: Size) -> Blank:
    """A model of this size."""
    query = torch.zeros(size.batch, FRAMES * size.tokens, size.heads, size.width)
    side = 2 ** (size.tokens.bit_length() // 2)
    return Blank(2 * size.tokens // side, 2 * side, size.batch, size.layers, query, size.rolls)


@torch.no_grad()
def seconds(generator: Blank, size: Size) -> list[float]:
    """CPU seconds of each chunk of a video that begins with a full window."""
    rows = size.window * size.tokens
    shape = (size.batch, rows, size.heads, size.width)
    cache = [{"k": torch.ones(shape), "v": torch.ones(shape), "global_end_index": rows, "local_end_index": rows}
             for _ in range(size.layers)]  # fmt: skip
    noise, times = torch.zeros_like(generator.answers[0]), []
    steps = [torch.full((size.batch, FRAMES), step) for step in STEPS]
    for chunk in range(size.chunks):
        began, latents = time.process_time(), noise
        for call, step in enumerate(steps):
            answer = generator(latents, None, step, cache, None, rows + chunk * FRAMES * size.tokens)[1]
            latents = answer if call == len(STEPS) - 2 else noise
        times.append(time.process_time() - began)
    return times


def policy_of(size: Size) -> tokentrim.Policy:
    """Prunes just before the clock counts; in a long video again and again."""
    at = range(WARM - 1, size.chunks, EVERY if size.rolls else size.chunks)
    return ForcedPolicy({chunk: size.dead for chunk in at}) if size.dead else tokentrim.ObservePolicy()


def added(size: Size, rounds: int) -> list[float]:
    """Milliseconds that we add to each chunk that counts: median of the differences of ``rounds`` pairs."""
    generator, differences = blank(size), []
    for _ in range(rounds):
        plain = seconds(generator, size)
        with tokentrim.patched(generator, policy_of(size)) as handle:
            differences.append(np.subtract(seconds(generator, size), plain)[WARM:] * 1000)
        assert size.rolls or handle.report.triggers == bool(size.dead) * size.batch, handle.report.summary()
    return [float(value) for value in np.median(differences, axis=0)]


PANELS: dict[str, tuple[str, Sequence[float]]] = {
    "tokens": ("tokens of a frame", (256, 1024, 4096, 16384, 32768)),
    "layers": ("layers", (1, 2, 4, 8, 16, 30)),
    "window": ("frames in the window", (6, 12, 21, 42, 84)),
    "batch": ("videos in a batch", (1, 2, 4, 8)),
    "dead": ("share of tokens that is dead", (0.02, 0.1, 0.3, 0.5, 0.7)),
}
LENGTH, BIN = 10_000, 500


def measure(base: Size, rounds: int, length: int = LENGTH) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By panel and arm, points of (size, ms a chunk)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, (_, values) in PANELS.items():
        arms = {"10 % dead": SHARE, "nothing dead": 0.0} if name != "dead" else {"dead": SHARE}
        for arm, dead in arms.items():
            for value in values:
                size = replace(base, **{"dead": dead, name: value})
                point = (value, statistics.median(added(size, rounds)))
                found.setdefault(name, {}).setdefault(arm, []).append(point)
                print(name, arm, *point, flush=True)
    for arm, dead in {"a prune every 20": SHARE, "nothing dead": 0.0}.items():
        times = added(replace(base, tokens=64, dead=dead, chunks=length + WARM, rolls=True), 1)
        step = min(BIN, length)
        bins = [(start + step, statistics.fmean(times[start : start + step])) for start in range(0, length, step)]
        found.setdefault("length", {})[arm] = bins
    return found


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Milliseconds per unit, by the median of all pairs of points (Theil and Sen), and the exponent of the growth.

    The exponent is d log ms / d log size over the upper half of the points: 0 flat, 1 linear, 2 quadratic.
    """
    pairs = [(a, b) for i, a in enumerate(points) for b in points[i + 1 :]]
    upper = np.log(np.maximum(np.array(points[len(points) // 2 :]), 1e-9))
    exponent = np.polyfit(upper[:, 0], upper[:, 1], 1)[0] if len(upper) > 1 else 0.0
    return statistics.median((y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairs), float(exponent)


def table(found: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """Lines of Markdown."""
    lines = ["| what grows | arm | from | to | slope | exponent |", "| --- | --- | --- | --- | --- | --- |"]
    for name, arms in found.items():
        for arm, points in arms.items():
            (x0, y0), (x1, y1), (each, power) = points[0], points[-1], slope(points)
            ends = f"{y0:.2f} ms at {x0:,} | {y1:.2f} ms at {x1:,}"
            lines.append(f"| {name} | {arm} | {ends} | {1000 * each:.3g} us each | {power:.2f} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, list[tuple[float, float]]]]) -> Path:
    """Six panels, each from 0: a straight line is linear growth, a level one none."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    for axes, (name, arms) in zip(figure.subplots(2, 3).flat, found.items(), strict=True):
        for arm, points in arms.items():
            x, y = zip(*points, strict=True)
            colour = INK if arm == "nothing dead" else CUT
            axes.plot(x, y, color=colour, marker="o", ms=3, lw=1.2, label=arm)
        axes.set_xlim(0)
        axes.set_ylim(0, 1.15 * max(y for points in arms.values() for _, y in points))
        axes.set_title(PANELS[name][0] if name in PANELS else "chunks of the video", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        # Five digits at each tick run into one another.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"))
        axes.legend(fontsize=7, frameon=False)
    figure.supylabel("added per chunk, ms", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None}, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    return PICTURE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="Where the points are written, or read from if it is there.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.json and options.json.is_file():
        points = json.loads(options.json.read_text())
    else:
        points = measure(Size(), options.rounds)
        if options.json:
            options.json.write_text(json.dumps(points))
    print(table(points))
    print(draw(points))
