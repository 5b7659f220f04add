"""``tokentrim demo``: see and measure what pruning does to a small trained video model: some minutes of one core."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokentrim_hooks.cli.options import FOLDER, SEED, as_json, device, need, ready_folder, whole
from tokentrim_hooks.console import plain_table, progress
from tokentrim_hooks.report import files

if TYPE_CHECKING:
    from tokentrim_hooks.experiments.demo.acts import Act, Size

FILES = {
    "{act}.gif": "films: truth, unpatched and patched beside each other",
    "{act}.png": "the same as stills",
    "{act}.html": "all measures",
    "report/report.html": "what tokentrim did to the planted fault, chunk by chunk",
    "table.txt": "what is printed here",
    "results.json": "every figure",
}
"""What is written, by name: of each act, or once."""


@click.command()
@click.option("--out", type=FOLDER, default="demo", show_default=True, help="Folder to write into.")
@whole("--seeds", help="Videos, each with its own scene and noise; by default 10, with --fast 4.")
@whole("--chunks", least=2, help="Chunks to generate where nothing is planted; by default 30, with --fast 8.")
@click.option(
    "--seed", type=SEED, metavar="INTEGER", default=1, show_default=True, help="First seed: other scenes, other noise."
)
@click.option("--fast", is_flag=True, help="Few videos, few chunks: a look, not a measurement.")
@device(default="cpu", show_default=True, help="Where torch computes.")
@click.option("--untrained", is_flag=True, help="Tiny random weights: shows the plumbing, the video is noise.")
def demo(out: Path, untrained: bool, **options: Any) -> None:
    """See and measure it on a small trained model.

    Says in a few sentences what came of it, then shows a table, then where the films and pages are. It takes four to
    seven minutes of one core; with --fast, one or two.
    """
    need("safetensors", "scipy", "PIL", "jinja2", "matplotlib", "tqdm")
    ready_folder(out)
    acts = _played(size_of(options), options["device"], untrained)
    print(said(acts))
    write(acts, out, made_with(options["device"], untrained))
    print(f"Files in {out}:")
    for name, words in FILES.items():
        print(f"  {', '.join(dict.fromkeys(name.format(act=act.name) for act in acts))}: {words}")


def _played(size: Size, place: str, untrained: bool) -> list[Act]:
    from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
    from tokentrim_hooks.experiments.demo.acts import play

    load = functools.partial(ReferenceMaker.load, sink=None, trained=not untrained, device=place)
    with progress(f"{size.scenes} videos", size.total_chunks) as advance:
        return play(load, size, lambda *_: advance())


def size_of(options: dict[str, Any]) -> Size:
    """The size that the options ask for."""
    from tokentrim_hooks.experiments.demo.acts import Size

    size = Size(scenes=4, chunks=8, after=4) if options["fast"] else Size()
    return Size(options["seeds"] or size.scenes, options["chunks"] or size.chunks, size.after, options["seed"])


def said(acts: Sequence[Act]) -> str:
    """The sentences, the small table, how to read it."""
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
    outcomes = {act.name: [vars(take.outcome) for take in act.takes] for act in acts}
    files.write(folder / "results.json", as_json({"settings": made, **outcomes}))


def save_report(act: Act, folder: Path) -> Path:
    """The patched run's log and its page, with drift maps over the first video and the unpatched one beside it."""
    from tokentrim_hooks.experiments.what_if.answers import section
    from tokentrim_hooks.metrics.frames import as_frames
    from tokentrim_hooks.report.page import write_page

    assert act.paper.report is not None, "it is the patched run"
    act.paper.report.save(folder)
    videos = (as_frames(take.video[0] * 0.5 + 0.5) for take in (act.paper, act.off))
    return write_page(folder, *videos, sections=[section(folder)])


def made_with(place: str, untrained: bool) -> dict[str, Any]:
    """What the results were made with."""
    import torch

    from tokentrim_hooks.report.provenance import versions

    return {
        "weights": "untrained" if untrained else "trained",
        "device": place,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
