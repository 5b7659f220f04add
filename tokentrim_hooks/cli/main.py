"""The command line ``tokentrim``: finds the subcommand and hands over to its file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from tokentrim_hooks.cli import adapters, bench, compare, demo, detect, metrics, policies, report, run
from tokentrim_hooks.console import printable
from tokentrim_hooks.errors import TokenTrimError


class Command(Protocol):
    """What a subcommand's file holds."""

    HELP: str

    def configure(self, parser: argparse.ArgumentParser, /) -> None:
        """Declare its options."""

    def run(self, options: argparse.Namespace, /) -> int:
        """Do it; returns the exit status."""


MODULES = (demo, adapters, policies, detect, run, report, metrics, compare, bench)
COMMANDS = {module.__name__.rpartition(".")[2]: cast(Command, module) for module in MODULES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a wrong use or a missing extra)."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except TokenTrimError as failure:
        print(printable(f"tokentrim {options.command}: {failure}"), file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    top = argparse.ArgumentParser(prog="tokentrim", description="Prune drifting tokens from a video model's context.")
    choices = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        # Without abbreviations: those of a script that `run` is given would be taken for ours.
        command.configure(choices.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False))
    return top
