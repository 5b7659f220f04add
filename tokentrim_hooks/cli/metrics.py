"""``tokentrim metrics``: measure videos without any downloaded weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokentrim_hooks.cli.options import write_json
from tokentrim_hooks.console import show_table
from tokentrim_hooks.errors import TokenTrimError

HELP = "Measure videos; no weights needed."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim metrics`` takes."""
    parser.add_argument("videos", type=Path, nargs="*", help="video files of any kind that ffmpeg reads")
    parser.add_argument("--period", type=int, help="frames of a chunk (Self-Forcing: 12), for spikes at its boundaries")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--vbench", type=Path, nargs="+", help="VBench result files: their scores by VBench's weights")


def run(options: argparse.Namespace) -> int:
    """Measure videos without any downloaded weights; one column per video."""
    if not options.videos and not options.vbench:
        raise TokenTrimError("give at least one video, or --vbench with result files")
    measured = {str(path): _measured(path, options.period) for path in options.videos}
    if measured:
        names = list(next(iter(measured.values())))
        rows = [[name, *(_cell(values.get(name)) for values in measured.values())] for name in names]
        show_table(["metric", *measured], rows)
    if options.vbench:
        _show_vbench(options.vbench)
    if options.json:
        write_json(options.json, measured)
    return 0


def _measured(path: Path, period: int | None) -> dict[str, Any]:
    from tokentrim_hooks.metrics.metrics import measure
    from tokentrim_hooks.metrics.video import read_video

    frames, fps = read_video(path)
    values = measure(frames, fps, period)
    similarity: Any = values.pop("lag_similarity")
    return {**values, **{f"similarity at lag {lag}": value for lag, value in similarity.items()}}


def _show_vbench(paths: list[Path]) -> None:
    from tokentrim_hooks.metrics.vbench import read_results, scores

    found = scores(read_results(paths))
    totals = {"quality": found.quality, "semantic": found.semantic, "total (4:1)": found.total}
    show_table(["VBench", "score"], [[name, _cell(value)] for name, value in totals.items()])
    if found.missing:
        print(f"missing, so not counted as zero: {', '.join(found.missing)}")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
