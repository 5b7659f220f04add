"""``tokentrim demo``: see and measure what pruning does to a small trained video model, in about two minutes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokentrim_hooks.console import progress, show_table
from tokentrim_hooks.errors import MissingExtraError
from tokentrim_hooks.extras import require
from tokentrim_hooks.report.provenance import versions
from tokentrim_hooks.report.record import Report

if TYPE_CHECKING:
    from tokentrim_hooks.experiments.demo.measures import Results
    from tokentrim_hooks.experiments.demo.runs import Runs, Size
    from tokentrim_hooks.reference.pipeline import ReferencePipeline

NEEDED = ("safetensors", "scipy", "PIL")
"""Modules of the ``demo`` extra without which there is no demo; without rich it is plain, without imageio a gif."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tokentrim demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write into (default: ./demo)")
    parser.add_argument("--seeds", type=_count, metavar="N", help="videos, each with its own scene and noise")
    parser.add_argument("--chunks", type=_count, metavar="N", help="chunks to generate in the drift part")
    parser.add_argument("--seed", type=int, default=1, help="first seed: other scenes, other noise (default: 1)")
    parser.add_argument("--fast", action="store_true", help="few videos, few chunks: a look, not a measurement")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--untrained", action="store_true", help="tiny random weights: shows the plumbing, the video is noise"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo, print its tables and write its files.

    Raises:
        MissingExtraError: the ``demo`` extra is not installed.
    """
    for module in NEEDED:
        require(module, "demo")
    from tokentrim_hooks.experiments.demo.measures import measure
    from tokentrim_hooks.experiments.demo.runs import roll_out_all

    size = size_of(options)
    pipeline = load(options)
    with progress(f"{size.scenes} videos, five rollouts", size.total_chunks) as advance:
        runs = roll_out_all(pipeline, size, advance)
    results = measure(runs)
    show(results)
    print("Written:")
    for path in write(runs, results, options.out, settings(options)):
        print(f"  {path}")
    return 0


def size_of(options: argparse.Namespace) -> Size:
    """The size that the options ask for."""
    from tokentrim_hooks.experiments.demo.runs import Size

    size = Size(scenes=4, chunks=8, healthy=4, after=4) if options.fast else Size()
    return Size(
        options.seeds or size.scenes, options.chunks or size.chunks, size.healthy, size.after, options.seed
    )


def load(options: argparse.Namespace) -> ReferencePipeline:
    """The trained reference model, or with ``--untrained`` a tiny random one."""
    from tokentrim_hooks.reference.pipeline import ReferencePipeline

    if options.untrained:
        return ReferencePipeline.random(seed=0, grid=(8, 8), device=options.device)
    return ReferencePipeline.pretrained(device=options.device)


def show(results: Results) -> None:
    """Print the tables and what their columns mean."""
    from tokentrim_hooks.experiments.demo.table import NOTES, remarks, tables

    for title, headings, rows in tables(results):
        print()
        show_table(headings, rows, title)
    print("", *remarks(results), "", NOTES, "", sep="\n")


def write(runs: Runs, results: Results, folder: Path, made_with: dict[str, Any]) -> list[Path]:
    """Write tables, results, pictures and TokenTrim's own reports into ``folder``; return the paths."""
    from tokentrim_hooks.experiments.demo.pictures import draw_all
    from tokentrim_hooks.experiments.demo.table import as_json, as_text

    folder.mkdir(parents=True, exist_ok=True)
    table, figures = folder / "table.txt", folder / "results.json"
    table.write_text(as_text(results), encoding="utf-8")
    figures.write_text(json.dumps(as_json(results, made_with), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    shown = {"report": (runs.drift, "tokentrim"), "report-fault": (runs.fault, "context")}
    pairs = [(folder / place, arms[name], arms["unpatched"]) for place, (arms, name) in shown.items()]
    saved = [save_report(arm.report, arm.video[0], place, base.video[0]) for place, arm, base in pairs if arm.report]
    return [table, figures, *draw_all(runs, folder), *saved]


def save_report(report: Report, video: Tensor, folder: Path, unpatched: Tensor | None = None) -> Path:
    """Save a report; with the ``report`` extra also as a page, with drift maps over ``video`` ``[F, 3, H, W]``.

    ``unpatched`` is the video of the same noise without the patch, to be shown beside it.
    """
    from tokentrim_hooks.metrics.metrics import as_frames
    from tokentrim_hooks.report.page import write_page

    report.save(folder)
    frames = [None if v is None else as_frames(v * 0.5 + 0.5) for v in (video, unpatched)]
    try:
        return write_page(folder, *frames)
    except MissingExtraError:
        return folder


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the results were made with."""
    return {
        "weights": "untrained" if options.untrained else "trained",
        "policy": "DriftPolicy() (the paper's constants)",
        "probe": "first-step",
        "device": options.device,
        "threads": torch.get_num_threads(),
        **versions(),
    }


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
