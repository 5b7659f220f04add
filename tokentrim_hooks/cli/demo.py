"""``tokentrim demo``: see and measure what pruning does to a small trained video model, in about two minutes."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokentrim_hooks.cli.options import as_json, need, positive
from tokentrim_hooks.console import plain_table, progress
from tokentrim_hooks.report import files
from tokentrim_hooks.report.provenance import versions

if TYPE_CHECKING:
    from tokentrim_hooks.experiments.demo.acts import Act, Size

HELP = "See and measure it on a small trained model, in about two minutes."
FILES = {
    "{act}.gif": "films: truth, unpatched and pruned beside each other",
    "{act}.png": "the same as stills",
    "{act}.html": "all measures",
    "report/report.html": "what tokentrim did to the planted fault, chunk by chunk",
    "table.txt": "what is printed here",
    "results.json": "every figure",
}
"""What is written, by name: of each act, or once."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``tokentrim demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write into (default: ./demo)")
    parser.add_argument("--seeds", type=positive, metavar="N", help="videos, each with its own scene and noise")
    parser.add_argument("--chunks", type=positive, metavar="N", help="chunks to generate where nothing is planted")
    parser.add_argument("--seed", type=int, default=1, help="first seed: other scenes, other noise (default: 1)")
    parser.add_argument("--fast", action="store_true", help="few videos, few chunks: a look, not a measurement")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--untrained", action="store_true", help="tiny random weights: shows the plumbing, the video is noise"
    )


def run(options: argparse.Namespace) -> int:
    """Roll out, say what came of it, write the files.

    Raises:
        MissingExtraError: the ``demo`` extra is not installed.
    """
    need("safetensors", "scipy", "PIL", "jinja2", "matplotlib", "tqdm")
    from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
    from tokentrim_hooks.experiments.demo.acts import play

    size = size_of(options)
    load = functools.partial(ReferenceMaker.load, sink=None, trained=not options.untrained, device=options.device)
    with progress(f"{size.scenes} videos", size.total_chunks) as advance:
        acts = play(load, size, lambda *_: advance())
    print(said(acts))
    write(acts, options.out, made_with(options))
    print(f"Files in {options.out}:")
    for name, words in FILES.items():
        print(f"  {', '.join(dict.fromkeys(name.format(act=act.name) for act in acts))}: {words}")
    return 0


def size_of(options: argparse.Namespace) -> Size:
    """The size that the options ask for."""
    from tokentrim_hooks.experiments.demo.acts import Size

    size = Size(scenes=4, chunks=8, after=4) if options.fast else Size()
    return Size(options.seeds or size.scenes, options.chunks or size.chunks, size.after, options.seed)


def said(acts: Sequence[Act]) -> str:
    """Three sentences, the small table, how to read it."""
    from tokentrim_hooks.experiments.demo.words import COLUMNS, NOTES, sentences, table

    return "\n\n".join([*sentences(acts), plain_table(COLUMNS, table(acts)), NOTES]) + "\n"


def write(acts: Sequence[Act], folder: Path, made: dict[str, Any]) -> None:
    """Write what FILES lists into ``folder``."""
    from tokentrim_hooks.experiments.compare.page import render
    from tokentrim_hooks.experiments.demo.pictures import draw_all

    files.made(folder)
    draw_all(acts, folder)
    for act in acts:
        about = {**made, "target": act.title, "trial": dict(act.trial.settings)}
        page = render(act.rows, act.trial.columns, about, act.trial.watch)
        files.write(folder / f"{act.name}.html", page)
    save_report(acts[0], files.below(folder, "report"))
    files.write(folder / "table.txt", said(acts))
    outcomes = {act.name: [vars(take.outcome) for take in (act.off, act.paper)] for act in acts}
    files.write(folder / "results.json", as_json({"settings": made, **outcomes}))


def save_report(act: Act, folder: Path) -> Path:
    """The patched run's log and its page, with drift maps over the first video and the unpatched one beside it."""
    from tokentrim_hooks.metrics.frames import as_frames
    from tokentrim_hooks.report.page import write_page

    assert act.paper.report is not None, "it is the patched run"
    act.paper.report.save(folder)
    return write_page(folder, *(as_frames(take.video[0] * 0.5 + 0.5) for take in (act.paper, act.off)))


def made_with(options: argparse.Namespace) -> dict[str, Any]:
    """What the results were made with."""
    return {
        "weights": "untrained" if options.untrained else "trained",
        "device": options.device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
