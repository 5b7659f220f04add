"""The command line ``tokentrim``: its subcommands, its exit status, and failures in a sentence or two.

Status 2 stands for a wrong use, a missing extra, or a file that cannot be read or written; 130 for Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from tokentrim_hooks.cli.bench import bench
from tokentrim_hooks.cli.compare import compare
from tokentrim_hooks.cli.completion import completion
from tokentrim_hooks.cli.demo import demo
from tokentrim_hooks.cli.installed.adapters import adapters
from tokentrim_hooks.cli.installed.detect import detect
from tokentrim_hooks.cli.installed.policies import policies
from tokentrim_hooks.cli.metrics import metrics
from tokentrim_hooks.cli.report import report
from tokentrim_hooks.cli.script.attempt import attempt
from tokentrim_hooks.cli.script.run import run
from tokentrim_hooks.cli.status import INTERRUPTED, WRONG
from tokentrim_hooks.console import meant, one_line, reason, say
from tokentrim_hooks.errors import TokenTrimError

ALL = (demo, attempt, run, report, metrics, adapters, policies, detect, compare, bench, completion)
COMMANDS: dict[str, click.Command] = {str(command.name): command for command in ALL}
KEEP = {"try", "run", "compare"}
"""Subcommands that write while they work; the others write at their end."""


class InOrder(click.Group):
    """Lists its subcommands in the order in which a newcomer meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all subcommands."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is asked for; an unknown one is told with those that look like it, as options are."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            perhaps = f"; {question}" if (question := meant(args[0], self.commands)) else ""
            raise click.UsageError(f"no such command {args[0]!r}{perhaps}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=InOrder, commands=COMMANDS, invoke_without_command=True)
@click.version_option(package_name="tokentrim-hooks")
@click.pass_context
def tokentrim(context: click.Context) -> None:
    """Prune drifting tokens from a video model's context."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = " ".join(["tokentrim", *[word for word in given[:1] if word in COMMANDS]])
    try:
        return int(tokentrim.main(given, prog_name="tokentrim", standalone_mode=False) or 0)
    except click.UsageError as failure:
        path = failure.ctx.command_path if failure.ctx else name
        words = " ".join(failure.format_message().split())  # click lists choices one below the other
        told, status = f"{path}: {words}\nSee `{path} --help`.", WRONG
    except TokenTrimError as failure:
        told, status = f"{name}: {failure}", WRONG
    except OSError as failure:
        told, status = f"{name}: {_reason(failure)}.\nSee to this file or device, or name another one.", WRONG
    except click.Abort:
        kept = "; what was finished until then is kept" if name.split()[-1] in KEEP else ""
        told, status = f"{name}: stopped by Ctrl-C{kept}.", INTERRUPTED
    say(_in_lines(told, given))
    return status


def _reason(failure: OSError) -> str:
    """The file, and what is the matter with it."""
    where = f"{failure.filename}: " if failure.filename is not None else ""
    return f"{where}{reason(failure)}"


def _in_lines(words: str, given: Sequence[str]) -> str:
    """The words, with no line that begins inside a name which was given: files may have an end of line in theirs."""
    for name in given:
        words = words.replace(name, one_line(name)) if "\n" in name else words
    return words
