"""``tokentrim compare``: paired rollouts of many settings over one model, with intervals and controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tokentrim_hooks.cli.options import FOLDER, SEED, device, need, ready_folder, threads, whole
from tokentrim_hooks.console import progress, show_table
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.extras import imported, in_short
from tokentrim_hooks.report.files import write

COLUMNS = ("name", "aspect", "better", "window")
FAULTS = ("context", "chunk", "settled", "noise", "late")
KINDS = ("fading", "burning", "sink", "framewise")
"""As in the reference model, which is not imported for them."""


def _split(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _kinds(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """The kinds named, each once; () where the option stands without any, None where it does not stand."""
    if not value:
        return None if value is None else ()
    names = _split(value)
    strange = [name for name in names if name not in (*KINDS, "all")]
    if strange or not names:
        raise click.BadParameter(f"no kind of drift {', '.join(strange) or value!r}; there are {', '.join(KINDS)}, all")
    return KINDS if "all" in names else tuple(dict.fromkeys(names))


@click.command()
@click.argument("target", required=False, metavar="[MODULE:FUNCTION]")
@click.option("--reference", is_flag=False, flag_value="", callback=_kinds, metavar="[KIND,...]",
              help="Compare on the small trained model instead; how it drifts may follow, as for --kind.")  # fmt: skip
@click.option("--out", type=FOLDER, default="runs/compare", show_default=True, help="A second call goes on in it.")
@whole("--seeds", default=8, show_default=True, help="Number of pairs.")
@click.option("--first-seed", type=SEED, default=1, show_default=True, metavar="N", help="Seed of the first pair.")
@whole("--batch", default=8, show_default=True, help="Seeds rolled out together.")
@click.option("--only", help="Standard settings by name, separated by commas; empty for none of them.")
@click.option("--policies", metavar="NAME,...",
              help="Installed policies by name, each with its control, beside what --only names.")  # fmt: skip
@click.option("--setting", multiple=True, metavar="'NAME: key=value, ...'", help="One more; repeatable.")
@click.option("--list", "listed", is_flag=True, help="Print the standard settings and stop.")
@threads()
@whole("--chunks", default=24, show_default=True, help="Reference model: chunks to generate.")
@click.option("--fault", type=click.Choice(FAULTS), help="Reference model: plant a blotch.")
@click.option("--kind", "kinds", callback=_kinds, metavar="KIND,...",
              help=f"Reference model: how it drifts ({', '.join(KINDS)}); several, or all, make one page; by default "
              f"{KINDS[0]}.")  # fmt: skip
@whole("--sink", least=0, metavar="FRAMES",
              help="Reference model: frames of an anchor; by default as it was trained.")  # fmt: skip
@device(default="cpu", show_default=True, help="Reference model: where torch computes.")
@click.option("--untrained", is_flag=True, help="Reference model: tiny random weights, plumbing only.")
def compare(target: str | None, listed: bool, **options: Any) -> None:
    """Compare settings over paired rollouts, with controls.

    MODULE:FUNCTION makes a trial from a list of seeds. Prints the table and writes table.md, results.jsonl and
    compare.html. Of several kinds of drift there is one page more, with effect, price and cost of each setting.
    """
    if listed:
        _list()
        return
    reference = options.pop("reference")
    if bool(target) == (reference is not None):
        raise click.UsageError("give either MODULE:FUNCTION or --reference")
    if reference and options["kinds"]:
        raise click.UsageError("the kinds of drift are given twice; give them to --reference or to --kind")
    options["kinds"] = reference or options["kinds"] or KINDS[:1]
    if target and len(options["kinds"]) > 1:
        raise click.UsageError("several kinds of drift are the reference model's; give --reference, or one kind")
    need("scipy", "numpy", "jinja2", "tqdm")
    if options["threads"]:
        import torch

        torch.set_num_threads(options["threads"])
    _compare(target, options)


def _list() -> None:
    from tokentrim_hooks.experiments.compare.settings import METHODS, STANDARD, changes

    rows = [[setting.name, changes(setting.as_dict())] for setting in (*STANDARD, *METHODS)]
    show_table(["setting", "differs from the paper's in"], rows)


@dataclass
class _Run:
    """One comparison in its folder, ready to go on."""

    kind: str
    folder: Path
    make: Any
    settings: list[Any]
    trial: Any
    store: Any


def _compare(target: str | None, options: dict[str, Any]) -> None:
    """Everything that can be refused is, for all kinds, before anything is computed."""
    from tokentrim_hooks.experiments.compare.rollouts import batches, compare

    first, kinds = options["first_seed"], options["kinds"]
    groups = batches(range(first, first + options["seeds"]), options["batch"])
    _one_layout(options["out"], len(kinds) > 1)
    runs = [_ready(target, options, kind, groups[0]) for kind in kinds]
    for run in runs:
        of = f"{run.kind}: " if len(runs) > 1 else ""
        label = f"{of}pairs {options['seeds']}, settings {len(run.settings)}"
        with progress(label, len(groups) * len(run.settings)) as advance:
            compare(run.make, run.settings, groups, run.store, advance)
        _write(run)
    if len(runs) > 1:
        _present_kinds(options["out"], runs)
    else:
        _present(runs[0])


def _one_layout(out: Path, several: bool) -> None:
    """A folder holds one comparison, or one below it for each kind: not both, for both write the page.

    Raises:
        TokenTrimError: it is taken by the other.
    """
    others = [out] if several else [out / kind for kind in KINDS]
    if any((folder / "settings.json").is_file() for folder in others):
        words = "one kind of drift" if several else "several kinds of drift"
        raise TokenTrimError(f"{out} holds a comparison of {words}; give another --out")


def _ready(target: str | None, options: dict[str, Any], kind: str, seeds: Sequence[int]) -> _Run:
    from tokentrim_hooks.experiments.compare.rollouts import opening_of
    from tokentrim_hooks.experiments.compare.store import Store

    folder = options["out"] / kind if len(options["kinds"]) > 1 else options["out"]
    make = make_of(target, options, kind)
    settings = _settings(options, anchors=getattr(make, "sink", 1) > 0)
    trial = _somebodys(target, make, seeds) if target else make(seeds)
    if any(setting.graded for setting in settings):
        opening_of(trial)
    store = Store(ready_folder(folder), made_with(target, options, trial), settings)
    return _Run(kind, folder, make, settings, trial, store)


def _somebodys(target: str, make: Any, seeds: Sequence[int]) -> Any:
    """The first trial of a user's function.

    Raises:
        TokenTrimError: it fails, or what it makes is no trial.
    """
    try:
        trial = make(seeds)
    except (Exception, SystemExit) as failure:
        words = f"{target} makes no trial of the seeds {list(seeds)}: {in_short(failure)}"
        raise TokenTrimError(f"{words}.\nGive a function that takes a list of seeds.") from failure
    lacks = [name for name in ("model", "columns", "run", "measure") if not getattr(trial, name, None)]
    if lacks:
        words = f"{target} makes {type(trial).__name__}, which has no {', '.join(lacks)}"
        raise TokenTrimError(f"{words}.\nA trial has model, columns, run() and measure(video).")
    return trial


def _settings(options: dict[str, Any], anchors: bool) -> list[Any]:
    from tokentrim_hooks.experiments.compare.plugged import of_policies
    from tokentrim_hooks.experiments.compare.settings import choose

    only, policies = options["only"], options["policies"]
    names = None if only is None and policies is None else _split(only or "")
    return choose(names, options["setting"], anchors, of_policies(_split(policies or "")))


def make_of(target: str | None, options: dict[str, Any], kind: str) -> Any:
    """The function that makes trials; ``kind`` is of the reference model."""
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
        kind=kind,
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


def _changes(runs: Sequence[_Run]) -> dict[str, str]:
    from tokentrim_hooks.experiments.compare.settings import changes

    return {o.setting: changes(o.description) for run in runs for o in run.store.outcomes}


def _write(run: _Run) -> None:
    """The page and the table of one comparison, in its folder."""
    from tokentrim_hooks.experiments.compare.page import render
    from tokentrim_hooks.experiments.compare.table import BOLD, NOTES, markdown, summarise

    columns, watch = run.trial.columns, getattr(run.trial, "watch", None)
    rows = summarise(run.store.outcomes, columns, watch)
    made = {**run.store.made_with, "settings": _changes([run])}
    write(run.folder / "table.md", f"{markdown(rows, columns, watch)}\n{BOLD}\n{NOTES}\n")
    write(run.folder / "compare.html", render(rows, columns, made, watch))


def _present(run: _Run) -> None:
    from tokentrim_hooks.experiments.compare.table import NOTES, summarise, terminal

    watch = getattr(run.trial, "watch", None)
    rows = summarise(run.store.outcomes, run.trial.columns, watch)
    for columns, lines in terminal(rows, run.trial.columns, watch):
        show_table(columns, lines)
    print(NOTES)
    print(f"Written: {', '.join(str(run.folder / name) for name in ('table.md', 'compare.html', 'results.jsonl'))}")


def _present_kinds(out: Path, runs: Sequence[_Run]) -> None:
    """One page and one table of all kinds, and the summary in the terminal."""
    from tokentrim_hooks.experiments.compare.page import render_kinds
    from tokentrim_hooks.experiments.compare.summary import ABOUT, Part, in_words, stacked

    parts = [Part.of(run.kind, run.store.outcomes, run.trial, run.store.made_with) for run in runs]
    write(out / "table.md", in_words(parts))
    write(out / "compare.html", render_kinds(parts, _changes(runs)))
    for part in parts:
        show_table(*stacked(part))
    print(ABOUT)
    print(f"Written: {out / 'table.md'}, {out / 'compare.html'}; of each kind in a folder of its own below {out}")
