"""The command line ``tokentrim``: one function a sub-command, all of them in ``COMMANDS``."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokentrim_hooks import api
from tokentrim_hooks.cli import metrics, report, run
from tokentrim_hooks.console import show_table
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.bench import command as bench
from tokentrim_hooks.experiments.compare import command as compare
from tokentrim_hooks.experiments.demo import command as demo
from tokentrim_hooks.extras import imported
from tokentrim_hooks.plugins import installed_observers


@dataclass(frozen=True)
class Command:
    """A sub-command: ``configure`` declares its options, ``run`` does it and returns the exit status."""

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a wrong use or a missing extra)."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except TokenTrimError as failure:
        print(f"tokentrim {options.command}: {failure}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    top = argparse.ArgumentParser(prog="tokentrim", description="Prune drifting tokens from a video model's context.")
    choices = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        # Without abbreviations: those of a script that `run` is given would be taken for ours.
        own = choices.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        command.configure(own)
    return top


# ---------------------------------------------------------------------------------------------- adapters


def configure_adapters(_parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim adapters`` takes: nothing."""


def show_adapters(_options: argparse.Namespace) -> int:
    """List installed adapters and observers, and plugins that failed to load with the reason."""
    rows = []
    for info in api.adapters():
        state = (info.error and "failed to load") or ("disabled" if info.disabled else "ready")
        models = ", ".join(info.adapter.models) if info.adapter else info.error
        rows.append([info.name, state, info.distribution, models])
    show_table(["adapter", "state", "from", "models"], rows)
    show_table(["observer", "from"], [[info.name, info.distribution] for info in installed_observers()])
    return 0


# ---------------------------------------------------------------------------------------------- detect


def configure_detect(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim detect`` takes."""
    parser.add_argument(
        "model", metavar="PACKAGE.MODULE:FACTORY", help="a function or class that makes the model, or the model itself"
    )


def show_detection(options: argparse.Namespace) -> int:
    """Print what every adapter says of a model; status 0 if exactly one recognises it, else 1."""
    found = api.detect(make_model(options.model))
    rows = [[item.adapter, "yes" if item.matches else "no", item.distribution, item.reason] for item in found]
    show_table(["adapter", "recognised", "from", "reason"], rows)
    return 0 if sum(item.matches for item in found) == 1 else 1


def make_model(target: str) -> Any:
    """Import ``package.module:name`` (current folder included) and call it if it is a function or class.

    Raises:
        TokenTrimError: the target is not of that form, or not to be imported.
    """
    found = imported(target)
    return found() if inspect.isroutine(found) or inspect.isclass(found) else found


COMMANDS: dict[str, Command] = {
    "demo": Command("See and measure it on a small trained model, in about two minutes.", demo.configure, demo.run),
    "adapters": Command("List the installed adapters and observers.", configure_adapters, show_adapters),
    "detect": Command("Ask every adapter whether it recognises a model, and why.", configure_detect, show_detection),
    "run": Command("Run an unmodified inference script, patched.", run.configure, run.run),
    "report": Command("Render a run's log as one HTML file.", report.configure, report.run),
    "metrics": Command("Measure videos; no weights needed.", metrics.configure, metrics.run),
    "compare": Command("Compare settings over paired rollouts, with controls.", compare.configure, compare.run),
    "bench": Command("Measure what being patched costs, in one run.", bench.configure, bench.run),
}
