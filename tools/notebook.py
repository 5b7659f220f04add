"""examples/first_prune.ipynb: the tutorial's text and code as a notebook, run, with what it printed and drew.

``python tools/notebook.py --write`` makes it anew; a test runs it and compares.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial" / "first-prune.md"
NOTEBOOK = ROOT / "examples" / "first_prune.ipynb"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\.\./([\w/-]+\.md)")
"""Links of the tutorial are seen from docs/tutorial; the notebook lies in examples/."""


def cells(page: str) -> Iterator[nbformat.NotebookNode]:
    """The page's text, its Python as code; what the page says that it prints is left out, the notebook prints it."""
    last = 0
    for number, found in enumerate(BLOCK.finditer(page)):
        if found[1] == "console":
            continue
        text = page[last : found.start()].strip()
        if text:
            yield new_markdown_cell(LINK.sub(r"](../docs/\1", text), id=f"text-{number}")
        if found[1] == "python":
            yield new_code_cell(shown(found[2].strip()), id=f"code-{number}")
        last = found.end()
    yield new_markdown_cell(LINK.sub(r"](../docs/\1", page[last:].strip()), id="text-last")


def shown(code: str) -> str:
    """A picture that the tutorial saves is shown, too."""
    return f"{code}\nimage" if code.endswith('image.save("first.png")') else code


def made(folder: Path) -> nbformat.NotebookNode:
    """The notebook, run in ``folder``.

    Raises:
        CellExecutionError: a cell failed.
    """
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = new_notebook(cells=list(cells(TUTORIAL.read_text(encoding="utf-8"))), metadata=kernel)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:
        cell.metadata = {}  # the times at which cells ran would change with every run
    return book


def printed(book: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Source and printed text of each cell."""
    outputs = [[out.text for out in cell.get("outputs", []) if out.output_type == "stream"] for cell in book.cells]
    return [(cell.source, "".join(texts)) for cell, texts in zip(book.cells, outputs, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Say whether the notebook is what the tutorial gives; with ``--write`` make it so."""
    parser = argparse.ArgumentParser(prog="python tools/notebook.py", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write examples/first_prune.ipynb of this checkout")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where it runs, and leaves what it writes")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    book = made(options.folder)
    if options.write:
        nbformat.write(book, NOTEBOOK)
        return 0
    same = printed(book) == printed(nbformat.read(NOTEBOOK, as_version=4))
    print("as the tutorial" if same else "stale: run python tools/notebook.py --write")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
