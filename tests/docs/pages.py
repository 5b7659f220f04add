"""Code blocks of a Markdown page: where they stand, what they are, and what the text says that they print."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (?P<comment>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$"
    r"(?:\n\n?```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: the line of its first code line, the comment right above, the ``text`` block right below."""

    page: Path
    line: int
    language: str
    code: str
    comment: str = ""
    output: str | None = None

    @property
    def not_run(self) -> str:
        """The reason for which it is not run, or nothing."""
        return self.comment.removeprefix("not run: ") if self.comment.startswith("not run: ") else ""

    def run(self, namespace: dict[str, object]) -> None:
        """Execute in ``namespace``; what it prints must be what the page says, where the page says it."""
        code = compile("\n" * (self.line - 1) + self.code, str(self.page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        said = printed.getvalue().rstrip()
        if self.output is not None and said != self.output.rstrip():
            raise AssertionError(f"{self.page.name}:{self.line} prints\n{said}\nthe page says\n{self.output}")


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [_block(page, text, found) for found in FENCE.finditer(text)]


def python_blocks(page: Path) -> list[Block]:
    """The Python ones."""
    return [block for block in blocks(page) if block.language == "python"]


def _block(page: Path, text: str, found: re.Match[str]) -> Block:
    line = text.count("\n", 0, found.start("code")) + 1
    return Block(page, line, found["language"], found["code"], found["comment"] or "", found["output"])
