"""Words, tables and progress for the terminal, and tables for Markdown files: what lays out rows of text."""

from __future__ import annotations

import difflib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO, TypeVar

Advance = Callable[[], None]
"""Call once for every step done."""

Thing = TypeVar("Thing")

WIDTH, LEAST = 110, 30
"""Columns of a table in a terminal that is no narrower, and of its last column, which is wrapped to fit."""

Rows = Sequence[Sequence[str]]


def meant(name: str, known: Iterable[str]) -> str:
    """A question after the known name that looks most like the one given; empty if none does."""
    alike = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {alike[0]!r}?" if alike else ""


def plain_table(columns: Sequence[str], rows: Rows, title: str = "") -> str:
    """Rows of text under their headings, aligned with spaces; only the last column wraps, at the terminal's width."""
    from tabulate import tabulate  # late: a command's help has no table

    columns, *rows = [[printable(cell) for cell in row] for row in (columns, *rows)]
    before = sum(4 + max(_width(row[i]) for row in [columns, *rows]) for i in range(len(columns) - 1))
    # Cells are words already: a number is not to be read and rounded once more.
    table = tabulate(
        rows, columns, tablefmt="simple", disable_numparse=True,
        maxcolwidths=[*[None] * (len(columns) - 1), max(width() - before, LEAST)] if rows else None,
    )  # fmt: skip
    return f"{title}\n{table}" if title else table


def width() -> int:
    """Columns to fill: those of the terminal, if there is one and it has fewer than ``WIDTH``."""
    seen = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if seen else WIDTH


def printable(text: str) -> str:
    """Text for a terminal: of what would steer it, a plugin's or a log's words keep nothing but the ends of lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(name: str) -> str:
    """The name of a file, in which even an end of line may stand, for a line of words or of a table."""
    return printable(name).replace("\n", "\\n")


def reason(failure: BaseException) -> str:
    """Why a file could not be read, in a few words."""
    deep = "it is nested too deep" if isinstance(failure, RecursionError) else ""
    return deep or getattr(failure, "strerror", None) or str(failure)


def say(words: str) -> None:
    """Print words to stderr; a script that has closed it, or a reader that has gone, costs no log and no page."""
    with suppress(OSError, ValueError, AttributeError):
        print(printable(words), file=sys.stderr, flush=True)


def _width(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def show_table(columns: Sequence[str], rows: Rows, title: str = "") -> None:
    """Print a table and an empty line."""
    print(plain_table(columns, rows, title), end="\n\n")


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """A Markdown table of text that anybody may have written. Not padded, as tabulate's would be."""
    escaped = [[in_markdown(cell) for cell in row] for row in [columns, *rows]]
    lines = [escaped[0], ["---"] * len(columns), *escaped[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_markdown(text: str) -> str:
    """Text that ends no cell and no line of Markdown, is neither a tag nor a link nor a picture, and steers nothing."""
    for sign, instead in (("\\|", "\\\\|"), ("|", "\\|"), ("<", "&lt;"), ("](", "]\\(")):
        text = text.replace(sign, instead)
    return printable(" ".join(text.splitlines()))


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """A progress bar of ``total`` steps, on stderr."""
    from tqdm import tqdm  # of the demo extra, as are those that show progress

    with tqdm(total=total, desc=label) as bar:
        yield bar.update


def counted(things: Iterable[Thing], label: str, total: int = 0, stream: TextIO | None = None) -> Iterator[Thing]:
    """Things as they come, with a line on stderr that says how far that is: four times a second in a terminal, which
    is the same line again, and every half minute elsewhere. ``total`` is a guess; 0 for none.
    """
    out = stream or sys.stderr
    pause, begin, end = (0.25, "\r", "") if out.isatty() else (30.0, "", "\n")
    began = said = time.monotonic()
    number, width = 0, 0
    for number, thing in enumerate(things, 1):
        yield thing
        del thing  # a frame of a video: not to be held while the next one is made
        now = time.monotonic()
        if now - said >= pause:
            line, said = _how_far(label, number, total, now - began), now
            print(f"{begin}{line:<{width}}", end=end, file=out, flush=True)
            width = len(line)
    if width and end == "":
        print(f"\r{'':<{width}}\r", end="", file=out, flush=True)


def _how_far(label: str, number: int, total: int, seconds: float) -> str:
    if total < number:
        return printable(f"{label} {number}")
    left = round(seconds / number * (total - number))
    return printable(f"{label} {number} of {total}, {left // 60}:{left % 60:02d} left")
