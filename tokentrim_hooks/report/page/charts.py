"""Pictures of a run, drawn with matplotlib from its records: control chart, drift map, cache map.

Every function returns a matplotlib Figure; nothing touches pyplot's global state, so it works in threads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokentrim_hooks.extras import require
from tokentrim_hooks.report.page.words import chosen
from tokentrim_hooks.report.record import ChunkRecord

Array = npt.NDArray[Any]

INK, BAND, WARM, CUT = "#20242c", "#b8cbe6", "#eeeeee", "#d62839"
CELLS = {"live": "#5b8bd0", "pruned by a later chunk": "#d62839", "anchor, never pruned": "#e0a030"}
"""Cells of the cache map, in the order of their numbers (from 1), with their colours."""
SIDE = 1000
"""Rows and columns of a cache map at most: of more, several share a cell."""
POINTS = 1500
"""Chunks of a control chart at most."""
Limits = tuple[float, float]


def severity_limits(records: Iterable[ChunkRecord]) -> Limits | None:
    """The severities that charts of several samples have in common; None where nothing was judged."""
    found = [
        value
        for record in records
        for value in (record.severity, record.accepted_severity, record.mean, record.threshold)
        if record.severity is not None and value is not None and math.isfinite(value)
    ]
    if not found:
        return None
    margin = 0.05 * (max(found) - min(found)) or 0.05 * abs(max(found)) or 1.0
    return min(found) - margin, max(found) + margin


def control_chart(
    records: Sequence[ChunkRecord], warmup: int = 0, narrow: bool = False, limits: Limits | None = None
) -> Any:
    """Severity per chunk with running mean and threshold band; warm-up shaded, regenerated chunks red.

    ``records`` are those of one sample of one video. A hollow point is the severity accepted after regeneration. Chunks
    without a severity (the first one, given ones) leave a gap. ``narrow`` is for a phone: the same at half the width.
    ``limits`` are of the severity axis, for charts that are to be compared. Of more than POINTS chunks the pruned ones
    and evenly spread others are drawn.
    """
    figure, axes = _figure(4.4 if narrow else 7.5, 3.4)
    judged = chosen([r for r in records if r.severity is not None], POINTS)
    x = [r.chunk for r in judged]
    if not judged:
        _empty(axes, "no chunk was judged: a run of one chunk has no predecessor to drift from")
        return figure
    mean, threshold = ([_number(getattr(r, name)) for r in judged] for name in ("mean", "threshold"))
    axes.fill_between(x, mean, threshold, color=BAND, alpha=0.6, lw=0, label="mean to threshold")
    axes.plot(x, mean, color="#5b7fb5", lw=1, label="running mean")
    axes.plot(x, [_number(r.severity) for r in judged], color=INK, lw=1.2, marker="o", ms=3, label="severity")
    if warmup:
        last = judged[min(warmup, len(judged)) - 1].chunk
        axes.axvspan(judged[0].chunk - 0.5, last + 0.5, color=WARM, zorder=0, label="warm-up")
    pruned = [r for r in judged if r.pruned]
    if pruned:
        axes.plot([r.chunk for r in pruned], [r.severity for r in pruned], "o", color=CUT, ms=7, label="regenerated")
        accepted = [_number(r.accepted_severity) for r in pruned]
        axes.plot([r.chunk for r in pruned], accepted, "o", mfc="none", mec=CUT, ms=7, label="accepted instead")
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set_xlabel("chunk")
    axes.set_ylabel("severity (latent units)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes.get_legend_handles_labels()[0], narrow)
    return figure


def drift_map(record: ChunkRecord, picture: Array | None = None, top: float = 0.0) -> Any:
    """Token drift of one chunk as a heat map, the unstable set outlined, over ``picture`` if there is one.

    ``picture`` is ``[H, W, 3]`` uint8: a decoded frame, or a picture of the latent (:mod:`.thumbnails`). ``top`` is the
    drift that has the brightest colour, for maps that are to be compared; by default the chunk's largest.
    """
    height, width = record.grid
    columns = 1 if picture is None else 2
    figure, axes = _figure(*_map_size(height, width, columns), columns)
    heat_axes = axes if picture is None else axes[1]
    if len(record.drift) != height * width:
        _empty(heat_axes, "this chunk was not judged")
    else:
        heat = np.asarray(record.drift, dtype=float).reshape(height, width)
        top = top or largest_drift([record])
        image = heat_axes.imshow(heat, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        figure.colorbar(image, ax=heat_axes, shrink=0.8, label="drift")
        _outline(heat_axes, record)
    if picture is not None:
        axes[0].imshow(picture, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        _outline(axes[0], record)
        axes[0].set_axis_off()
    heat_axes.set_axis_off()
    figure.suptitle(f"chunk {record.chunk}: {map_in_words(record)}", fontsize=10)
    return figure


def map_in_words(record: ChunkRecord) -> str:
    """How many tokens of a drift map are outlined, and why."""
    height, width = record.grid
    verdict = "pruned" if record.pruned else "would be pruned first"
    return f"{len(record.tokens)} of {height * width} tokens {verdict}"


def largest_drift(records: Iterable[ChunkRecord]) -> float:
    """The largest drift of any token, for maps of one scale."""
    return max([1e-12, *(value for record in records for value in record.drift if math.isfinite(value))])


def cache_map(records: Sequence[ChunkRecord], narrow: bool = False) -> Any:
    """Which tokens of which chunks' frames were pruned from the context, up to the end of the run.

    Rows are tokens, columns the chunks that hold them; ``records`` are those of one sample of one video. ``narrow`` is
    for a phone.
    """
    figure, axes = _figure(4.4 if narrow else 7.5, 3.2)
    grid = cache_cells(records, SIDE)
    if not grid.size:
        _empty(axes, "no chunk was recorded")
        return figure
    colours = require("matplotlib.colors", "report").ListedColormap(list(CELLS.values()))
    tokens, columns = _extent(records)
    extent = (-0.5, columns - 0.5, tokens - 0.5, -0.5)
    axes.imshow(grid, cmap=colours, vmin=1, vmax=len(CELLS), aspect="auto", interpolation="nearest", extent=extent)
    axes.set_xlabel("chunk in the context")
    axes.set_ylabel("spatial token (row-major)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    patches = require("matplotlib.patches", "report")
    seen = [(label, colour) for n, (label, colour) in enumerate(CELLS.items(), 1) if n == 1 or (grid == n).any()]
    _legend(figure, [patches.Patch(color=colour, label=label) for label, colour in seen], narrow)
    return figure


def cache_cells(records: Sequence[ChunkRecord], side: int = SIDE) -> Array:
    """``[tokens, chunks]``: 1 = live, 2 = pruned by a later chunk, 3 = anchor. The frames that a prune reached are its
    dead rows divided by its tokens, counted back from the pruning chunk's start; anchors are the video's first frames,
    as many as a prune has spared. More than ``side`` rows or columns share cells: one pruned token colours its cell."""
    records = [r for r in records if r.grid[0] * r.grid[1]]
    tokens, columns = _extent(records)
    by_row, by_column = math.ceil(tokens / side) or 1, math.ceil(columns / side) or 1
    cells = np.ones((math.ceil(tokens / by_row), math.ceil(columns / by_column)), dtype=np.int8)
    starts = np.array([r.start for r in records])
    ends = starts + np.array([r.frames for r in records]) - 1
    for record in (r for r in records if r.pruned and r.tokens):
        reached = math.ceil(record.dead / len(record.tokens))
        dead = np.flatnonzero((record.start - reached <= ends) & (starts < record.start))
        rows = np.unique(np.array(record.tokens) // by_row)
        cells[np.ix_(rows, np.unique(dead // by_column))] = 2
    anchors = max((record.anchors for record in records), default=0)
    cells[:, np.unique(np.flatnonzero(starts < anchors) // by_column)] = 3
    return cells


def _extent(records: Sequence[ChunkRecord]) -> tuple[int, int]:
    """Tokens of a frame, and chunks that have a grid."""
    sizes = [r.grid[0] * r.grid[1] for r in records if r.grid[0] * r.grid[1]]
    return max(sizes, default=0), len(sizes)


def figure_bytes(figure: Any, kind: str = "svg") -> bytes:
    """The figure as an SVG or PNG file; the same figure gives the same bytes."""
    import io

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
    return _named(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _named(svg: bytes) -> bytes:
    """An SVG whose random names, which are hashes with a salt of the moment, are numbers in order of appearance.

    The setting ``svg.hashsalt`` would do the same, but it is the whole process's, and pages are drawn in threads, too.
    """
    found = dict.fromkeys(re.findall(rb'id="((?:[a-zA-Z]|image)[0-9a-f]{10})"', svg))
    numbers = {name: b"n%d" % number for number, name in enumerate(found)}
    return re.sub(rb"\b(?:[a-zA-Z]|image)[0-9a-f]{10}\b", lambda match: numbers.get(match[0], match[0]), svg)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _legend(figure: Any, handles: Sequence[Any], narrow: bool) -> None:
    """Above the axes: beside them it would take a third of a phone's width."""
    figure.legend(handles=handles, loc="outside upper left", ncols=2 if narrow else 3, fontsize=9, frameon=False)


def _map_size(height: int, width: int, columns: int) -> tuple[float, float]:
    """Inches for a map of that grid, a third of a page at most; also for a 1x1 grid."""
    ratio = max(0.3, min(3.0, width / max(height, 1)))
    return 2.2 * ratio**0.5 * columns + 0.8, 2.2 / ratio**0.5 + 0.5


def _outline(axes: Any, record: ChunkRecord) -> None:
    """Draw the border of the unstable set, dark under bright, so that it shows on any picture."""
    lines = require("matplotlib.collections", "report").LineCollection
    edges = border(record.tokens, record.grid[1])
    thin = max(0.6, min(1.6, 30 / max(*record.grid, 1)))
    for colour, width in (("#000000", 2.4 * thin), ("#39d0ff", thin)):
        axes.add_collection(lines(edges, colors=colour, linewidths=width, capstyle="projecting", clip_on=False))


def border(tokens: Sequence[int], columns: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Sides between tokens of the set and others, as ((x, y), (x, y)) in tokens; a token's centre is a whole number."""
    inside = {divmod(token, columns) for token in tokens}
    sides = []
    for y, x in sorted(inside):
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if (y + dy, x + dx) not in inside:
                middle, half = (x + dx / 2, y + dy / 2), (abs(dy) / 2, abs(dx) / 2)
                ends = [(middle[0] + sign * half[0], middle[1] + sign * half[1]) for sign in (-1, 1)]
                sides.append((ends[0], ends[1]))
    return sides


def _empty(axes: Any, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, fontsize=9)
    axes.set_axis_off()


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
