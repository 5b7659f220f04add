"""``tokentrim compare``: paired rollouts of many settings over one model, with intervals and controls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from tokentrim_hooks.cli.options import need, positive
from tokentrim_hooks.console import progress, show_table
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.compare.settings import METHODS, STANDARD, changes, choose
from tokentrim_hooks.extras import imported
from tokentrim_hooks.reference.fault import FAULTS
from tokentrim_hooks.reference.kinds import BASE, KINDS
from tokentrim_hooks.report.files import write
from tokentrim_hooks.report.provenance import versions

HELP = "Compare settings over paired rollouts, with controls."
COLUMNS = ("name", "aspect", "better", "window")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim compare`` takes."""
    parser.add_argument("target", nargs="?", metavar="MODULE:FUNCTION", help="makes a trial from a list of seeds")
    parser.add_argument("--reference", action="store_true", help="compare on the small trained model instead")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder; a second call goes on in it")
    parser.add_argument("--seeds", type=positive, default=8, metavar="N", help="number of pairs (default: 8)")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="seeds rolled out together (default: 8)")
    parser.add_argument("--only", help="standard settings by name, separated by commas; empty for none of them")
    parser.add_argument("--setting", action="append", default=[], metavar="'NAME: key=value, ...'", help="one more")
    parser.add_argument("--list", action="store_true", help="print the standard settings and stop")
    parser.add_argument("--threads", type=positive, help="CPU threads of torch")
    own = parser.add_argument_group("reference model")
    own.add_argument("--chunks", type=positive, default=24, metavar="N", help="chunks to generate (default: 24)")
    own.add_argument("--fault", choices=tuple(FAULTS), help="plant a blotch and measure the error around it")
    own.add_argument("--kind", choices=tuple(KINDS), default=BASE, help="how it drifts (default: fading)")
    own.add_argument("--sink", type=int, metavar="FRAMES", help="frames of an anchor (default: as it was trained)")
    own.add_argument("--device", default="cpu")
    own.add_argument("--untrained", action="store_true", help="tiny random weights: plumbing only")


def run(options: argparse.Namespace) -> int:
    """Run what is missing, print the table, write ``table.md``, ``results.json`` and ``compare.html``.

    Raises:
        TokenTrimError: wrong options, or a folder that holds another comparison.
    """
    if options.list:
        rows = [[setting.name, changes(setting.as_dict())] for setting in (*STANDARD, *METHODS)]
        show_table(["setting", "differs from the paper's in"], rows)
        return 0
    if bool(options.target) == options.reference:
        raise TokenTrimError("give either MODULE:FUNCTION or --reference")
    need("scipy", "numpy", "jinja2", "tqdm")
    if options.threads:
        torch.set_num_threads(options.threads)
    _compare(options)
    return 0


def _compare(options: argparse.Namespace) -> None:
    from tokentrim_hooks.experiments.compare.rollouts import batches, compare
    from tokentrim_hooks.experiments.compare.store import Store

    names = None if options.only is None else [n.strip() for n in options.only.split(",") if n.strip()]
    make = make_of(options)
    settings = choose(names, options.setting, anchors=getattr(make, "sink", 1) > 0)
    groups = batches(range(options.first_seed, options.first_seed + options.seeds), options.batch)
    trial = make(groups[0])
    store = Store(options.out, made_with(options, trial), settings)
    with progress(f"{options.seeds} seeds, {len(settings)} settings", len(groups) * len(settings)) as advance:
        compare(make, settings, groups, store, advance)
    _present(options.out, store, trial)


def make_of(options: argparse.Namespace) -> Any:
    """The function that makes trials."""
    if not options.reference:
        return imported(options.target)
    need("safetensors")
    from tokentrim_hooks.experiments.compare.trials import ReferenceMaker

    return ReferenceMaker.load(
        options.chunks,
        options.fault,
        options.sink,
        trained=not options.untrained,
        device=options.device,
        kind=options.kind,
    )


def made_with(options: argparse.Namespace, trial: Any) -> dict[str, Any]:
    """What must be equal for results to stand in one table, the columns included."""
    return {
        "target": options.target or "reference",
        "batch": options.batch,
        "trial": dict(getattr(trial, "settings", {})),
        "columns": [{key: getattr(column, key) for key in COLUMNS} for column in trial.columns],
        "watch": getattr(trial, "watch", None),
        "versions": versions(),
    }


def _present(folder: Path, store: Any, trial: Any) -> None:
    from tokentrim_hooks.experiments.compare.page import render
    from tokentrim_hooks.experiments.compare.table import BOLD, NOTES, markdown, summarise, terminal

    watch = getattr(trial, "watch", None)
    rows = summarise(store.outcomes, trial.columns, watch)
    for columns, lines in terminal(rows, trial.columns, watch):
        show_table(columns, lines)
    print(NOTES)
    made = {**store.made_with}
    made["settings"] = {o.setting: changes(o.description) for o in store.outcomes}
    write(folder / "table.md", f"{markdown(rows, trial.columns, watch)}\n{BOLD}\n{NOTES}\n")
    write(folder / "compare.html", render(rows, trial.columns, made, watch))
    print(f"Written: {folder / 'table.md'}, {folder / 'compare.html'}, {folder / 'results.jsonl'}")
