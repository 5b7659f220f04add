"""docs/cli.md: what each command takes, read from the commands themselves and never written by hand.

``python tools/cli_page.py`` prints the tables; with ``--write`` it puts them into the page. A test holds the page to
what is generated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import click
from places import filled

from tokentrim_hooks.cli.main import COMMANDS
from tokentrim_hooks.console import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def blocks() -> dict[str, str]:
    """The generated text of every command, by its name."""
    return {name: block(name, command) for name, command in COMMANDS.items()}


def block(name: str, command: click.Command) -> str:
    """How it is called, and a table of its options."""
    context = click.Context(command, info_name=f"tokentrim {name}")
    usage = f"`tokentrim {name} {' '.join(command.collect_usage_pieces(context))}`"
    rows = [row(option) for option in command.params if isinstance(option, click.Option)]
    table = markdown_table(["Option", "Meaning"], rows)
    return f"{usage}\n\n{table}" if rows else usage


def row(option: click.Option) -> list[str]:
    """One option: its names and value, then its help and default."""
    value = "" if option.is_flag else f" {option.make_metavar(click.Context(click.Command(option.name)))}"
    default = "" if not option.show_default or option.default is None else f" Default: `{option.default}`."
    names = " / ".join(f"`{name}`" for name in (", ".join(option.opts), *option.secondary_opts))
    return [f"{names}{value}", f"{option.help}{default}"]


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into the page")
    text = PAGE.read_text(encoding="utf-8")
    write = parser.parse_args().write
    for name, content in blocks().items():
        if write:
            text = filled(text, name, content)
        else:
            print(f"## {name}\n\n{content}\n")
    if write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
