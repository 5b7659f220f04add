"""``tokentrim try``: one script, patched and unpatched from the same seeds, and a page on what came of it."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokentrim_hooks.cli.options import FOLDER, SEED, need, whole, write_json
from tokentrim_hooks.cli.script.folders import claimed, discard
from tokentrim_hooks.cli.script.options import NUMBERS, SCRIPT, patching, script

if TYPE_CHECKING:
    from tokentrim_hooks.cli.script.arms import Arm, Launch
    from tokentrim_hooks.experiments.pair.words import Pair

MANY = 8


@click.command("try", context_settings=SCRIPT)
@click.option("--out", type=FOLDER, default="runs/try", show_default=True,
              help="Folder of the page, the videos and the log; numbered where an earlier one has it.")  # fmt: skip
@patching
@click.option("--video", default="", metavar="PATTERN", help="Where the script writes its videos, as 'out/*.mp4'.")
@click.option("--seed", type=SEED, default=0, show_default=True, metavar="N", help="Seed of the (first) pair.")
@whole("--pairs", default=1, show_default=True, help="Pairs, each from a seed of its own; from 6 on a verdict.")
@click.option("--once", is_flag=True, help="No second unpatched run, which shows if the script repeats itself.")
@script
def attempt(
    out: Path, video: str, seed: int, pairs: int, once: bool, script: str, is_module: bool, arguments: tuple[str, ...],
    **flags: Any,
) -> None:  # fmt: skip
    """Run a script with and without the patch; compare videos.

    Each run is a process of its own with the same seeds for Python, NumPy and torch. The page has both videos in step,
    curves over time, what was pruned, the cost, and a verdict that says no more than one pair can tell.
    """
    from tokentrim_hooks.cli.script.choices import Choices
    from tokentrim_hooks.cli.script.target import Target
    from tokentrim_hooks.experiments.pair.videos import Places

    if os.environ.get("RANK", "0") != "0":
        return  # the first process starts all others anew, three times
    Choices.of(flags)
    Target.of(script, arguments, is_module)
    need("av", "numpy", "cv2", extra="metrics", report=("jinja2", "matplotlib"), demo=("scipy",)[: pairs > 1])
    from tokentrim_hooks.cli.script.arms import Launch, without_torchrun  # which imports numpy

    launcher, environment = without_torchrun(os.environ)
    behind = [*(["-m"] if is_module else []), script, *arguments]
    places = Places.of(arguments, video)
    folder = claimed(out, _command(sys.argv[1:]), environment)
    places = dataclasses.replace(places, apart=folder.resolve())
    launch = Launch(_options(flags), behind, places, launcher, environment)
    try:
        _compared(launch, folder, seed, pairs, once)
    finally:
        discard(folder)


def _command(words: Sequence[str]) -> str:
    return shlex.join(["tokentrim", *words])


def _options(flags: dict[str, Any]) -> list[str]:
    """The options of ``tokentrim run`` that say how to patch."""
    single = {name: flags[name] for name in ("config", "probe", *NUMBERS) if flags[name] is not None}
    given = [*((name, value) for name, value in single.items()), *(("policy", name) for name in flags["policy"])]
    words = [word for name, value in given for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*words, *([] if flags["watch"] else ["--no-watch"])]


def _compared(launch: Launch, folder: Path, seed: int, pairs: int, once: bool) -> None:
    """Run all pairs, tell what became of the first, and of all where there are several."""
    arms = _arms(launch, folder, seed, repeat=not once)
    more = {seed + n: _arms(launch, folder / f"seed-{seed + n}", seed + n, repeat=False) for n in range(1, pairs)}
    pair, content = _told(arms, folder)
    results = {"seed": seed, **_figures(pair)}
    if more:
        from tokentrim_hooks.experiments.pair.several import table

        every = {seed: pair, **{number: _pair(some)[0] for number, some in more.items()}}
        results["pairs"] = {number: _figures(one) for number, one in every.items()}
        content["pairs"] = table(every)
    _written(folder, pair, content)
    write_json(folder / "try.json", results)


def _arms(launch: Launch, folder: Path, seed: int, repeat: bool) -> list[Arm]:
    """The patched run first: where nothing can be patched, nothing else is run."""
    kinds = ["patched", "unpatched", *(["unpatched-again"] if repeat else [])]
    arms = []
    for step, kind in enumerate(kinds, 1):
        words = f"seed {seed}, {kind.replace('-', ' ')} ({step} of {len(kinds)})"
        print(f"tokentrim try: {words}", file=sys.stderr, flush=True)
        arms.append(launch.run(folder / kind, seed, patched=kind == "patched"))
    return arms


def _told(arms: Sequence[Arm], folder: Path) -> tuple[Pair, dict[str, Any]]:
    """A pair, and what its page needs beside it."""
    from tokentrim_hooks.experiments.what_if.answers import section
    from tokentrim_hooks.report.page import write_page

    pair, videos, curves = _pair(arms)
    log = arms[0].logs[0]
    report = write_page(log, sections=[section(log)])
    words = sys.argv[1:]
    repeated = ["tokentrim", *words[:1], "--pairs", str(MANY), *words[1:]]
    return pair, {
        "videos": videos,
        "curves": curves,
        "command": _command(words),
        "again": shlex.join(repeated),
        "report": report.relative_to(folder).as_posix(),
        "others": len(arms[0].videos) - 1,
        "pairs": "",
    }


def _pair(arms: Sequence[Arm]) -> tuple[Pair, list[Path], list[Any]]:
    """What became of a pair, the two videos, their curves; the unpatched one first."""
    from tokentrim_hooks.cli.script.arms import videos_of_all
    from tokentrim_hooks.experiments.pair.curves import Curves, apart
    from tokentrim_hooks.experiments.pair.words import Pair
    from tokentrim_hooks.report.record import read_report

    patched, unpatched, *again = videos_of_all(arms)
    curves = [Curves.of(unpatched), Curves.of(patched)]
    pair = Pair(
        report=read_report(arms[0].logs[0]),
        unpatched=curves[0].values(),
        patched=curves[1].values(),
        apart=apart(unpatched, patched),
        again=apart(unpatched, again[0]) if again else None,
        repeated=bool(again),
        seconds=(arms[1].seconds, arms[0].seconds),
    )
    return pair, [unpatched, patched], curves


def _figures(pair: Pair) -> dict[str, Any]:
    from tokentrim_hooks.experiments.pair.words import headline, sentences

    own = {key: value for key, value in vars(pair).items() if key != "report"}
    return {"headline": headline(pair), "sentences": sentences(pair), "pruned": pair.pruned, **own}


def _written(folder: Path, pair: Pair, content: dict[str, Any]) -> None:
    """Write the page, and say in the terminal what it says."""
    from tokentrim_hooks.experiments.pair.page import write_page
    from tokentrim_hooks.experiments.pair.words import headline, sentences

    videos, curves = content.pop("videos"), content.pop("curves")
    page = write_page(folder, pair, videos, curves, content)
    print("\n".join([headline(pair), "", *sentences(pair), ""]))
    if content["pairs"]:
        print(content["pairs"])
    else:
        print(f"Again, over {MANY} seeds: {content['again']}")
    print(f"Page: {page}")
