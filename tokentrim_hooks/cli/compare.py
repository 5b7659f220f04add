"""``tokentrim compare``: paired rollouts of many settings over one model, with intervals and controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tokentrim_hooks.cli.options import FOLDER, SEED, device, need, ready_folder, whole
from tokentrim_hooks.console import progress, show_table
from tokentrim_hooks.extras import imported
from tokentrim_hooks.report.files import write

COLUMNS = ("name", "aspect", "better", "window")
FAULTS = ("context", "chunk", "settled", "noise", "late")
KINDS = ("fading", "burning", "sink", "framewise")
"""As in the reference model, which is not imported for them."""


@click.command()
@click.argument("target", required=False, metavar="[MODULE:FUNCTION]")
@click.option("--reference", is_flag=True, help="Compare on the small trained model instead.")
@click.option("--out", type=FOLDER, default="runs/compare", show_default=True, help="A second call goes on in it.")
@whole("--seeds", default=8, show_default=True, help="Number of pairs.")
@click.option("--first-seed", type=SEED, default=1, show_default=True, metavar="N", help="Seed of the first pair.")
@whole("--batch", default=8, show_default=True, help="Seeds rolled out together.")
@click.option("--only", help="Standard settings by name, separated by commas; empty for none of them.")
@click.option("--setting", multiple=True, metavar="'NAME: key=value, ...'", help="One more; repeatable.")
@click.option("--list", "listed", is_flag=True, help="Print the standard settings and stop.")
@whole("--threads", help="CPU threads of torch.")
@whole("--chunks", default=24, show_default=True, help="Reference model: chunks to generate.")
@click.option("--fault", type=click.Choice(FAULTS), help="Reference model: plant a blotch.")
@click.option("--kind", type=click.Choice(KINDS), default=KINDS[0], show_default=True,
              help="Reference model: how it drifts.")  # fmt: skip
@whole("--sink", least=0, metavar="FRAMES",
              help="Reference model: frames of an anchor; by default as it was trained.")  # fmt: skip
@device(default="cpu", show_default=True, help="Reference model: where torch computes.")
@click.option("--untrained", is_flag=True, help="Reference model: tiny random weights, plumbing only.")
def compare(target: str | None, listed: bool, **options: Any) -> None:
    """Compare settings over paired rollouts, with controls.

    MODULE:FUNCTION makes a trial from a list of seeds. Prints the table and writes table.md, results.jsonl and
    compare.html.
    """
    if listed:
        _list()
        return
    if bool(target) == options["reference"]:
        raise click.UsageError("give either MODULE:FUNCTION or --reference")
    need("scipy", "numpy", "jinja2", "tqdm")
    if options["threads"]:
        import torch

        torch.set_num_threads(options["threads"])
    _compare(target, options)


def _list() -> None:
    from tokentrim_hooks.experiments.compare.settings import METHODS, STANDARD, changes

    rows = [[setting.name, changes(setting.as_dict())] for setting in (*STANDARD, *METHODS)]
    show_table(["setting", "differs from the paper's in"], rows)


def _compare(target: str | None, options: dict[str, Any]) -> None:
    from tokentrim_hooks.experiments.compare.rollouts import batches, compare
    from tokentrim_hooks.experiments.compare.settings import choose
    from tokentrim_hooks.experiments.compare.store import Store

    only, out = options["only"], options["out"]
    names = None if only is None else [n.strip() for n in only.split(",") if n.strip()]
    make = make_of(target, options)
    settings = choose(names, options["setting"], anchors=getattr(make, "sink", 1) > 0)
    first = options["first_seed"]
    groups = batches(range(first, first + options["seeds"]), options["batch"])
    trial = make(groups[0])
    store = Store(ready_folder(out), made_with(target, options, trial), settings)
    with progress(f"{options['seeds']} seeds, {len(settings)} settings", len(groups) * len(settings)) as advance:
        compare(make, settings, groups, store, advance)
    _present(out, store, trial)


def make_of(target: str | None, options: dict[str, Any]) -> Any:
    """The function that makes trials."""
    if target:
        return imported(target)
    need("safetensors")
    from tokentrim_hooks.experiments.compare.trials import ReferenceMaker

    return ReferenceMaker.load(
        options["chunks"],
        options["fault"],
        options["sink"],
        trained=not options["untrained"],
        device=options["device"],
        kind=options["kind"],
    )


def made_with(target: str | None, options: dict[str, Any], trial: Any) -> dict[str, Any]:
    """What must be equal for results to stand in one table, the columns included."""
    from tokentrim_hooks.report.provenance import versions

    return {
        "target": target or "reference",
        "batch": options["batch"],
        "trial": dict(getattr(trial, "settings", {})),
        "columns": [{key: getattr(column, key) for key in COLUMNS} for column in trial.columns],
        "watch": getattr(trial, "watch", None),
        "versions": versions(),
    }


def _present(folder: Path, store: Any, trial: Any) -> None:
    from tokentrim_hooks.experiments.compare.page import render
    from tokentrim_hooks.experiments.compare.settings import changes
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
