"""``tokentrim completion``: what a shell needs to complete subcommands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "fish", "zsh")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    For bash: tokentrim completion bash >> ~/.bashrc
    """
    kind = get_completion_class(shell)
    assert kind is not None, "one of click's own"
    click.echo(kind(context.find_root().command, {}, "tokentrim", "_TOKENTRIM_COMPLETE").source())
