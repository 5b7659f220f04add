"""Pictures of a run, drawn with matplotlib from its records: control chart, drift map, cache map.

Every function returns a matplotlib Figure; nothing touches pyplot's global state, so it works in threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokentrim_hooks.extras import require
from tokentrim_hooks.report.record import ChunkRecord

Array = npt.NDArray[Any]

INK, BAND, WARM, CUT = "#20242c", "#b8cbe6", "#eeeeee", "#d62839"
CELLS = {"live": "#5b8bd0", "pruned by a later chunk": "#d62839", "anchor, never pruned": "#e0a030"}
"""Cells of the cache map, in the order of their numbers (from 1), with their colours."""
CELLS_AT_MOST = 100_000_000
"""Cells of a cache map, a byte each."""


def control_chart(records: Sequence[ChunkRecord], warmup: int = 0, narrow: bool = False) -> Any:
    """Severity per chunk with running mean and threshold band; warm-up shaded, regenerated chunks red.

    ``records`` are those of one sample of one video. A hollow point is the severity accepted after regeneration. Chunks
    without a severity (the first one, given ones) leave a gap. ``narrow`` is for a phone: the same at half the width.
    """
    figure, axes = _figure(4.4 if narrow else 7.5, 3.4)
    judged = [r for r in records if r.severity is not None]
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
    axes.set_xlabel("chunk")
    axes.set_ylabel("severity (latent units)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes.get_legend_handles_labels()[0], narrow)
    return figure


def drift_map(record: ChunkRecord, picture: Array | None = None) -> Any:
    """Token drift of one chunk as a heat map, the unstable set outlined, over ``picture`` if there is one.

    ``picture`` is ``[H, W, 3]`` uint8: a decoded frame, or a picture of the latent (:mod:`.thumbnails`).
    """
    height, width = record.grid
    columns = 1 if picture is None else 2
    figure, axes = _figure(*_map_size(height, width, columns), columns)
    heat_axes = axes if picture is None else axes[1]
    if len(record.drift) != height * width:
        _empty(heat_axes, "this chunk was not judged")
    else:
        heat = np.asarray(record.drift, dtype=float).reshape(height, width)
        top = max([1e-12, *heat[np.isfinite(heat)].tolist()])
        image = heat_axes.imshow(heat, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        figure.colorbar(image, ax=heat_axes, shrink=0.8, label="drift")
        _outline(heat_axes, record)
    if picture is not None:
        axes[0].imshow(picture, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        _outline(axes[0], record)
        axes[0].set_axis_off()
    heat_axes.set_axis_off()
    verdict = "pruned" if record.pruned else "would be pruned first"
    figure.suptitle(f"chunk {record.chunk}: {len(record.tokens)} of {height * width} tokens {verdict}", fontsize=10)
    return figure


def cache_map(records: Sequence[ChunkRecord], narrow: bool = False) -> Any:
    """Which tokens of which chunks' frames were pruned from the context, up to the end of the run.

    Rows are tokens, columns the chunks that hold them; ``records`` are those of one sample of one video. ``narrow`` is
    for a phone.
    """
    figure, axes = _figure(4.4 if narrow else 7.5, 3.2)
    if len(records) * max((r.grid[0] * r.grid[1] for r in records), default=0) > CELLS_AT_MOST:
        _empty(axes, "there are too many tokens and chunks to draw them all")
        return figure
    grid = cache_cells(records)
    if not grid.size:
        _empty(axes, "no chunk was recorded")
        return figure
    colours = require("matplotlib.colors", "report").ListedColormap(list(CELLS.values()))
    axes.imshow(grid, cmap=colours, vmin=1, vmax=len(CELLS), aspect="auto", interpolation="nearest")
    axes.set_xlabel("chunk in the context")
    axes.set_ylabel("spatial token (row-major)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    patches = require("matplotlib.patches", "report")
    seen = [(label, colour) for n, (label, colour) in enumerate(CELLS.items(), 1) if n == 1 or (grid == n).any()]
    _legend(figure, [patches.Patch(color=colour, label=label) for label, colour in seen], narrow)
    return figure


def cache_cells(records: Sequence[ChunkRecord]) -> Array:
    """``[tokens, chunks]``: 1 = live, 2 = pruned by a later chunk, 3 = anchor. The frames that a prune reached are its
    dead rows divided by its tokens, counted back from the pruning chunk's start; anchors are the video's first frames,
    as many as a prune has spared."""
    records = [r for r in records if r.grid[0] * r.grid[1]]
    tokens = max((r.grid[0] * r.grid[1] for r in records), default=0)
    cells = np.ones((tokens, len(records)), dtype=np.int8)
    for record in (r for r in records if r.pruned and r.tokens):
        reached = math.ceil(record.dead / len(record.tokens))
        for column, other in enumerate(records):
            if record.start - reached <= other.start + other.frames - 1 and other.start < record.start:
                cells[list(record.tokens), column] = 2
    anchors = max((record.anchors for record in records), default=0)
    cells[:, [record.start < anchors for record in records]] = 3
    return cells


def figure_bytes(figure: Any, kind: str = "svg") -> bytes:
    """The figure as an SVG or PNG file; the same figure gives the same bytes."""
    import io

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
    return buffer.getvalue()


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
