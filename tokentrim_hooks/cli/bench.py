"""``tokentrim bench``: what being patched costs on this machine, as ratios with intervals."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokentrim_hooks.cli.options import (
    STANDARD_OUTPUT,
    Share,
    device,
    json_option,
    need,
    ready_file,
    threads,
    whole,
    write_json,
)
from tokentrim_hooks.console import progress, show_table

if TYPE_CHECKING:
    from tokentrim_hooks.experiments.bench.measure import Results

NAMES = ("reference", "attention", "skyreels", "fastvideo")
GOALS = {"observing / unpatched": 1.002, "forced trigger / unpatched": 1.015}
"""What the project aims for, at full size on an H100-class GPU; shown beside the figures, never asserted."""


@click.command()
@click.option("--target", type=click.Choice(NAMES), default="reference", show_default=True, help="What to measure on.")
@click.option("--full", is_flag=True, help="The real model's size; wants a GPU.")
@device(help="Where torch computes; by default cuda where there is one, else cpu.")
@whole("--chunks", least=3, default=20, show_default=True,
              help="Chunks of a rollout, at least 3: one of them is pruned.")  # fmt: skip
@whole("--rounds", default=8, show_default=True, help="Rounds of all arms.")
@threads()
@click.option("--policy", multiple=True, metavar="NAME", help="An installed policy as one more arm; repeatable.")
@click.option("--dead", multiple=True, type=Share(), metavar="SHARE",
              help="Share of tokens to prune in one more arm, to find where it pays; repeatable.")  # fmt: skip
@click.option("--dtype", type=click.Choice(("float32", "bfloat16")),
              help="What the model computes in; by default bfloat16 on a GPU, float32 on a CPU.")  # fmt: skip
@json_option
def bench(**options: Any) -> None:
    """Measure what being patched costs, in one run.

    Weights are random: nothing is downloaded.
    """
    need("scipy", "tqdm")
    out = ready_file(options["file"])
    made_with, results = _measured(options)
    if options["file"] is not None:
        write_json(out, {"settings": made_with, **dataclasses.asdict(results), "break_even": _even(results, made_with)})
    if options["file"] != STANDARD_OUTPUT:
        show(results, made_with)


def _measured(options: dict[str, Any]) -> tuple[dict[str, Any], Results]:
    import torch

    from tokentrim_hooks.experiments.bench.break_even import forced
    from tokentrim_hooks.experiments.bench.measure import arms, measure, rollouts
    from tokentrim_hooks.experiments.bench.target import Size
    from tokentrim_hooks.experiments.bench.targets import TARGETS
    from tokentrim_hooks.plugins import make_policy

    more = {name: make_policy(name) for name in options["policy"]} | forced(options["dead"], options["chunks"])
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    place = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    size = Size(place, options["chunks"], options["full"], options["dtype"])
    target = TARGETS[options["target"]](size)
    made_with = {**settings(place, options), "model": {**target.words, "dtype": str(size.dtype)}}
    count = rollouts(options["rounds"], len(arms(size.chunks, target, more)), 2 + len(more))
    with progress(f"{options['target']}, {count} rollouts", count) as advance:
        return made_with, measure(target, options["chunks"], options["rounds"], place, advance, more)


def settings(place: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the figures were measured on and with."""
    import torch

    from tokentrim_hooks.experiments.bench.timing import clocks_of
    from tokentrim_hooks.report.provenance import versions

    gpu = torch.device(place).type == "cuda"
    return {
        "command": shlex.join(["tokentrim", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(place) if gpu else processor(),
        "kind": "cuda" if gpu else "cpu",
        "clocks": clocks_of(place) if gpu else None,
        "threads": torch.get_num_threads(),
        "target": options["target"],
        "full": options["full"],
        "chunks": options["chunks"],
        "rounds": options["rounds"],
        "dead": list(options.get("dead", ())),
        "versions": versions(),
    }


def processor() -> str:
    """The CPU's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def show(results: Results, made_with: dict[str, Any]) -> None:
    """Print what was measured, and on what."""
    from tokentrim_hooks.experiments.bench.memory import WORDS

    base = results.seconds["unpatched"]
    clock = "CUDA events" if made_with["kind"] == "cuda" else "CPU time"
    print(json.dumps(made_with, indent=1))
    print(f"One rollout, unpatched: {base:.3f} s, {base / made_with['chunks']:.4f} s per chunk ({clock})")
    added = {arm: 1000 * (seconds - base) / made_with["chunks"] for arm, seconds in results.seconds.items()}
    told = ", ".join(f"{arm} {extra:+.2f} ms" for arm, extra in added.items() if arm != "unpatched")
    print(f"Added per chunk: {told}")
    print(f"Forced trigger: {results.triggers} of {results.chunks} chunks, {results.extra_calls} further denoiser "
          f"calls beside {results.calls}, {results.dead} context rows dead; not in the clock: "
          f"{results.proof_calls} to prove the first prune, once per patch")  # fmt: skip
    rows = [
        [r.name, f"{r.median:.4f}", f"[{r.low:.4f}, {r.high:.4f}]", str(r.rounds), _goal(r.name)]
        for r in results.ratios
    ]
    show_table([clock, "median ratio", "95 % interval", "rounds", "aim (H100, full size)"], rows)
    if made_with["dead"]:
        share = _even(results, made_with)
        told = "at no share between 0 and 1" if share is None else f"with {100 * share:.1f} % of the tokens pruned"
        print(f"A forced trigger breaks even {told} (line through the arms' ratios to unpatched).")
    arms = list(results.shares)
    scopes = dict.fromkeys(scope for shares in results.shares.values() for scope in shares)
    show_table(["share of time", *arms],
               [[s, *(f"{100 * results.shares[arm].get(s, 0.0):.2f} %" for arm in arms)] for s in scopes])  # fmt: skip
    show_table(["host syncs per chunk", *arms],
               [["tokentrim's", *(f"{results.syncs[a]:.2f}" for a in arms)],
                ["the model's and its sampler's", *(f"{results.theirs[a]:.2f}" for a in arms)]])  # fmt: skip
    light = results.memory["unpatched"]
    rows = [[arm, f"{peak / 2**20:.2f} MiB", f"x {peak / light:.4f}"] for arm, peak in results.memory.items()]
    show_table(["peak memory", "bytes", "to unpatched (aim: x 1.02)"], rows)
    print(f"Peak memory: {WORDS[made_with['kind']]}.")


def _even(results: Results, made_with: dict[str, Any]) -> float | None:
    from tokentrim_hooks.experiments.bench.break_even import break_even

    return break_even(results.ratios, made_with["dead"])


def _goal(name: str) -> str:
    return f"{GOALS[name]}" if name in GOALS else "1" if "again" in name else ""
