"""Tables and progress for the terminal, and tables for Markdown files: the one place that lays out rows of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tabulate import tabulate

Advance = Callable[[], None]
"""Call once for every step done."""

WIDTH = 110
"""Columns of a table in a terminal; its last column is wrapped to fit."""

Rows = Sequence[Sequence[str]]


def plain_table(columns: Sequence[str], rows: Rows, title: str = "") -> str:
    """Rows of text under their headings, aligned with spaces; only the last column wraps, at ``WIDTH``."""
    before = sum(4 + max(_width(row[i]) for row in [columns, *rows]) for i in range(len(columns) - 1))
    # Cells are words already: a number is not to be read and rounded once more.
    table = tabulate(
        rows, columns, tablefmt="simple", disable_numparse=True,
        maxcolwidths=[*[None] * (len(columns) - 1), max(WIDTH - before, 30)] if rows else None,
    )  # fmt: skip
    return f"{title}\n{table}" if title else table


def _width(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def show_table(columns: Sequence[str], rows: Rows, title: str = "") -> None:
    """Print a table and an empty line."""
    print(plain_table(columns, rows, title), end="\n\n")


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """A Markdown table; a bar in a cell, or what looks like a tag, is escaped. Not padded, as tabulate's would be."""
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in [columns, *rows]]
    lines = [escaped[0], ["---"] * len(columns), *escaped[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """A progress bar of ``total`` steps, on stderr."""
    from tqdm import tqdm  # of the demo extra, as are those that show progress

    with tqdm(total=total, desc=label) as bar:
        yield bar.update
