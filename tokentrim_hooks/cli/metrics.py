"""``tokentrim metrics``: measure videos without any downloaded weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokentrim_hooks.cli.options import positive, write_json
from tokentrim_hooks.console import counted, printable, show_table
from tokentrim_hooks.errors import TokenTrimError

if TYPE_CHECKING:
    from tokentrim_hooks.metrics.rows import Measured

HELP = "Measure videos; no weights needed."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim metrics`` takes."""
    parser.add_argument("videos", type=Path, nargs="*", help="video files of any kind that ffmpeg reads")
    parser.add_argument("--all", action="store_true", help="all measures, not only the twelve that tell most")
    parser.add_argument("--period", type=positive, help="frames of a chunk (Self-Forcing: 12), for its boundaries")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--vbench", type=Path, nargs="+", help="VBench result files: their scores by VBench's weights")


def run(options: argparse.Namespace) -> int:
    """Measure videos without any downloaded weights; one column per video."""
    if not options.videos and not options.vbench:
        raise TokenTrimError("give at least one video, or --vbench with result files")
    measured = {str(path): _measured(path, options.period) for path in options.videos}
    if measured:
        _show(measured, options.all)
    if options.vbench:
        _show_vbench(options.vbench)
    if options.json:
        write_json(options.json, {name: video.as_json() for name, video in measured.items()})
    return 0


def _measured(path: Path, period: int | None) -> Measured:
    """Measure a video while it is read."""
    from tokentrim_hooks.metrics.meter import metered
    from tokentrim_hooks.metrics.rows import Measured
    from tokentrim_hooks.metrics.video import VideoFile

    video = VideoFile.of(path)
    return Measured.by(metered(counted(video.frames(), f"{path}: frame", video.expected), video.fps, period))


def _show(measured: dict[str, Measured], whole: bool) -> None:
    from tokentrim_hooks.metrics.rows import NOTE, ONE_PAIR, table

    for name, video in measured.items():
        print(printable(f"{name}: {video.values['frames']:.0f} frames, {video.values['seconds']:.1f} s"))
    show_table(*table(measured, whole))
    print(NOTE if len(measured) != 2 else f"{NOTE}\n{ONE_PAIR}")


def _show_vbench(paths: list[Path]) -> None:
    from tokentrim_hooks.metrics.vbench import read_results, scores

    found = scores(read_results(paths))
    totals = {"quality": found.quality, "semantic": found.semantic, "total (4:1)": found.total}
    show_table(["VBench", "score"], [[name, _cell(value)] for name, value in totals.items()])
    if found.missing:
        print(f"missing, so not counted as zero: {', '.join(found.missing)}")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
