"""Options that ``tokentrim run`` and ``tokentrim try`` share, and the script behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tokentrim_hooks.cli.options import Named

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

NUMBERS: dict[str, tuple[Any, str]] = {
    "fraction": (click.FLOAT, "the share of tokens, those that drift most, to judge and prune; 0.1."),
    "sensitivity": (click.FLOAT, "a chunk is pruned so many deviations above the mean; 2.0, lower prunes more."),
    "warmup": (click.INT, "severities to see before anything is pruned; 2."),
    "max_regenerations": (click.INT, "how often a chunk may be made again; 1."),
}
"""Options of DriftPolicy that are numbers, with their defaults in words, since help waits for no torch. The others are
switches, or come from a TOML file.
"""

SCRIPT = {"allow_interspersed_args": False}
"""Settings of a command whose arguments behind the script's name are the script's."""


def patching(command: Decorated) -> Decorated:
    """Declare what says how to patch."""
    for name, (kind, words) in reversed(NUMBERS.items()):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, type=kind, help=f"Policy drift: {words}")(command)
    for option in (
        click.option("--watch/--no-watch", default=True, help="Log what policy adaptive measures, for what-ifs; on."),
        click.option("--probe", type=click.Choice(("first-step", "candidate")), help="Which prediction is judged."),
        click.option("--config", type=Named(path_type=Path), help="TOML file: probe, observers, [policies.NAME]."),
        click.option("--policy", multiple=True, metavar="NAME", help="An installed policy, by name; repeatable."),
    ):
        command = option(command)
    return command


def script(command: Decorated) -> Decorated:
    """Declare the script, or with ``-m`` the module, and its own arguments, all that stand behind it."""
    command = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)(command)
    command = click.argument("script")(command)
    return click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module's name, as for python -m.")(command)
