"""``tokentrim metrics``: measure videos without any downloaded weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokentrim_hooks.cli.options import STANDARD_OUTPUT, json_option, need, ready_file, whole, write_json
from tokentrim_hooks.console import counted, one_line, say, show_table
from tokentrim_hooks.errors import VideoError

if TYPE_CHECKING:
    from tokentrim_hooks.metrics.rows import Measured
    from tokentrim_hooks.metrics.vbench import Scores


@click.command()
@click.argument("videos", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--all", "every", is_flag=True, help="All measures, not only the twelve that tell most.")
@whole("--period", help="Frames of a chunk (Self-Forcing: 12), for spikes at its boundaries.")
@json_option
@click.option("--vbench", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="A VBench result file: scores by VBench's own weights; repeatable.")  # fmt: skip
def metrics(
    videos: tuple[Path, ...], every: bool, period: int | None, file: Path | None, vbench: tuple[Path, ...]
) -> None:
    """Measure videos; no weights needed.

    VIDEOS are files of any kind that ffmpeg reads.
    """
    if not videos and not vbench:
        raise click.UsageError("give at least one video, or --vbench with a result file")
    if videos:
        need("av", "numpy", "cv2", extra="metrics")
    for path in {path for path in videos if videos.count(path) > 1}:
        raise click.UsageError(f"{path} is given twice; name each video once")
    out = ready_file(file)
    scored = _scored(vbench)  # read before the videos are, which may take an hour
    measured = {str(path): _measured(path, period) for path in videos}
    if file != STANDARD_OUTPUT and measured:
        _show({one_line(name): video for name, video in measured.items()}, every)
    if file != STANDARD_OUTPUT and scored is not None:
        _show_vbench(scored)
    if file is not None:
        found = {name: video.as_json() for name, video in measured.items()}
        write_json(out, {**found, **({} if scored is None else {"vbench": scored.as_json()})})


def _measured(path: Path, period: int | None) -> Measured:
    """Measure a video while it is read; says where it may not be what it seems."""
    from tokentrim_hooks.metrics.meter import metered
    from tokentrim_hooks.metrics.rows import Measured
    from tokentrim_hooks.metrics.video import VideoFile

    video, name = VideoFile.of(path), one_line(str(path))
    meter = metered(counted(video.frames(), f"{name}: frame", video.expected), video.fps, period)
    if len(meter) == 1:
        raise VideoError(f"{path} holds one frame, in which nothing moves or drifts.\nGive a video of more.")
    for words in (video.cut_off(len(meter)), _no_boundary(period, len(meter))):
        if words:
            say(f"tokentrim metrics: {name}: {words}")
    return Measured.by(meter)


def _no_boundary(period: int | None, frames: int) -> str:
    """Why nothing can be said of boundaries of chunks, if so."""
    if period is None or 1 < period < frames:
        return ""
    return f"--period {period} leaves no boundary to compare among {frames} frames"


def _show(measured: dict[str, Measured], whole: bool) -> None:
    from tokentrim_hooks.metrics.rows import notes, table

    for name, video in measured.items():
        print(f"{name}: {video.values['frames']:.0f} frames, {video.values['seconds']:.1f} s")
    show_table(*table(measured, whole))
    print(notes(measured))


def _scored(paths: tuple[Path, ...]) -> Scores | None:
    from tokentrim_hooks.metrics.vbench import read_results, scores

    return scores(read_results(paths)) if paths else None


def _show_vbench(found: Scores) -> None:
    totals = {"quality": found.quality, "semantic": found.semantic, "total (4:1)": found.total}
    show_table(["VBench", "score"], [[name, _cell(value)] for name, value in totals.items()])
    if found.missing:
        print(f"missing, so not counted as zero: {', '.join(found.missing)}")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
