"""Options that ``tokentrim run`` and ``tokentrim try`` share, and the script behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

NUMBERS: dict[str, Any] = {
    "fraction": click.FLOAT,
    "sensitivity": click.FLOAT,
    "warmup": click.INT,
    "max_regenerations": click.INT,
}
"""Options of DriftPolicy that are numbers; the others are switches or come from a TOML file."""

SCRIPT = {"allow_interspersed_args": False}
"""Settings of a command whose arguments behind the script's name are the script's."""


def patching(command: Decorated) -> Decorated:
    """Declare what says how to patch."""
    for name, kind in reversed(NUMBERS.items()):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, type=kind, help=f"DriftPolicy.{name}")(command)
    for option in (
        click.option("--probe", type=click.Choice(("first-step", "candidate")), help="Which prediction is judged."),
        click.option("--config", type=click.Path(path_type=Path), help="TOML file: probe, observers, [policies.NAME]."),
        click.option("--policy", multiple=True, metavar="NAME", help="An installed policy, by name; repeatable."),
    ):
        command = option(command)
    return command


def script(command: Decorated) -> Decorated:
    """Declare the script, or with ``-m`` the module, and its own arguments, all that stand behind it."""
    command = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)(command)
    command = click.argument("script")(command)
    return click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module's name, as for python -m.")(command)
