"""Tables and progress for the terminal: rich where it is installed, plain text otherwise."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Advance = Callable[[], None]
"""Call once for every step done."""

WIDTH = 110
"""Columns of plain-text output; the last column of a table is wrapped to fit."""


def has_rich() -> bool:
    """Whether rich (in the ``demo`` extra) can be imported."""
    return importlib.util.find_spec("rich") is not None


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under their headings, aligned with spaces; only the last column wraps, at ``WIDTH``."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    lines: list[str] = []
    for row in [columns, ["-" * width for width in widths[:-1]] + ["-" * len(columns[-1])], *rows]:
        head = "".join(cell.ljust(width + 2) for cell, width in zip(row[:-1], widths[:-1], strict=True))
        tail = textwrap.wrap(row[-1], max(WIDTH - indent, 30)) or [""]
        lines += [(head + tail[0]).rstrip(), *(" " * indent + rest for rest in tail[1:])]
    return "\n".join(lines)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table, in rich's drawing where rich is installed."""
    if not has_rich():
        print("\n".join(filter(None, [title, plain_table(columns, rows)])))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        # Figures stay whole; words in the first and the last column may wrap.
        table.add_column(column, no_wrap=0 < i < len(columns) - 1)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A file or a pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """A progress bar of ``total`` steps; without rich one line when it begins and one when it is done."""
    if not has_rich():
        print(f"{label} ...", flush=True)
        yield lambda: None
        print(f"{label}: done", flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
