"""Errors and warnings say what happened, then what to do, in two lines of a terminal: read from the source.

With the values of a run they are counted in every test that raises one: ``tests/conftest.py``.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import tokentrim_hooks as tokentrim
import tokentrim_hooks.errors

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tokentrim_hooks", "adapters", "examples")
COLUMNS, LINES = 120, 2
HOLE = "x" * 10
"""What stands for a value that the source does not tell."""

INNER = {"AssertionError", "AttributeError", "NotLoggedError", "NotSeparableError", "OSError", "StopIteration",
         "_WrongError", "Injected"}  # fmt: skip
"""What no user reads by itself: kits' findings, Python's protocols, reasons that a message of ours ends with."""
REASONS = {
    "tokentrim_hooks/report/fields.py",
    "tokentrim_hooks/experiments/compare/store.py",
    "tokentrim_hooks/metrics/vbench.py",
}
"""Where a ValueError is such a reason: what a file holds that no run of ours writes."""

VERBS = (
    "add|answer|ask|call|choose|compile|correct|count|derive|end|give|go|hide|install|keep|leave|let|load|look|make|mend"
    "|name|override|pass|patch|pip|prune|put|read|remove|rename|report|return|run|sample|say|scale|see|set|shard|switch|take|tap"
    "|test|try|turn|uninstall|use|wait|write"
)
ADVICE = re.compile(
    rf"(^|[;:.,?(]\s+|\n|\()(either |or |and |then |so )*({VERBS})\b"
    r"|\bmust (be|have|name|return|read|override|write)\b|; (installed|known|there are)\b",
    re.IGNORECASE,
)
"""A clause that begins with what to do, the rule that was broken, or the names there are."""


OPEN = {
    "adapters/_diffusers.py": "cannot follow",
    "tokentrim_hooks/api.py": f"{HOLE} stays unpatched",
    "tokentrim_hooks/cli/main.py": "no such command",  # click adds what to try
    "tokentrim_hooks/cli/script/choices.py": "",
    "tokentrim_hooks/cli/script/runner.py": "",
    "tokentrim_hooks/experiments/compare/settings.py": "setting ",
    "tokentrim_hooks/experiments/compare/store.py": f"{HOLE} is not an outcome",
    "tokentrim_hooks/failures.py": "tokentrim stepped aside",
    "tokentrim_hooks/handle/choice.py": "no adapter named",
    "tokentrim_hooks/loading.py": "plugin ",
    "tokentrim_hooks/plugins.py": "",
    "tokentrim_hooks/ranks/agreement.py": "rank ",
    "tokentrim_hooks/report/log_file.py": "",
    "tokentrim_hooks/report/observers.py": "observer ",
    "tokentrim_hooks/report/record.py": f"{HOLE} is not a chunk record",
    "tokentrim_hooks/rollout/guidance.py": "policies that guide",
}
"""Messages that end with another one, or with a hint that a variable holds: what to do is said there, or by others."""
STATED = {
    "tokentrim_hooks/rollout/regeneration.py",
    "tokentrim_hooks/rollout/replays.py",
}
"""Where the way out is ours, and taken: the warning says so."""


def _open(place: str, text: str) -> bool:
    path = place.rsplit(":", 1)[0]
    ends = text.endswith(HOLE) or path.endswith("log_file.py")
    return path in STATED or (path in OPEN and ends and text.startswith(OPEN[path]))


def _text(node: ast.expr, names: dict[str, str]) -> str | None:
    """The words of a message, with ``HOLE`` for its values; None if a variable holds them all."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) or HOLE for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names) or HOLE
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left, names) or HOLE) + (_text(node.right, names) or HOLE)
    return None


def _constants(body: Iterable[ast.AST], found: dict[str, str]) -> dict[str, str]:
    """``found``, and the texts that a module or a function gives a name to."""
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = _text(node.value, found)
            if text is not None:
                found = {**found, node.targets[0].id: text}
    return found


def _said(tree: ast.AST) -> Iterator[tuple[int, str, ast.expr]]:
    """Line, kind and words of each error that is made, and of each warning."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            kind = ast.unparse(node.func).split(".")[-1]
            if kind.endswith(("Error", "_WrongError")) or kind in ("warn", "not_checked"):
                yield node.lineno, kind, node.args[0]


def _inside(tree: ast.Module) -> Iterator[tuple[int, str, str | None]]:
    """The same with the words as text: those of a variable, or of a function of the module, are read where they are."""
    names = _constants(tree.body, {})
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    seen: dict[int, str | None] = {}
    for function in [tree, *functions.values()]:
        local = names if function is tree else _constants(ast.walk(function), names)
        for line, kind, words in _said(function):
            text = _text(words, local)
            called = functions.get(ast.unparse(words.func)) if isinstance(words, ast.Call) else None
            if text is None and called is not None:
                inner = _constants(ast.walk(called), names)
                for node in ast.walk(called):
                    if isinstance(node, ast.Return) and node.value is not None:
                        yield node.lineno, kind, _text(node.value, inner)
            elif text is not None or line not in seen:
                seen[line] = text
                yield line, kind, text


def _messages() -> Iterator[tuple[str, str]]:
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        place = path.relative_to(ROOT).as_posix()
        if "/tests/" in place:
            continue
        for line, kind, text in _inside(ast.parse(path.read_text(encoding="utf-8"))):
            inner = kind in INNER or kind == "not_checked" or (kind == "ValueError" and place in REASONS)
            if text is not None and not inner:
                yield f"{place}:{line}", text


MESSAGES = dict(_messages())


def test_most_messages_can_be_read_from_the_source() -> None:
    assert len(MESSAGES) > 230


@pytest.mark.parametrize("place", MESSAGES)
def test_a_message_is_short_and_says_what_to_do(place: str) -> None:
    text = MESSAGES[place]
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, COLUMNS)]
    assert len(lines) <= LINES, f"{len(lines)} lines: {text}"
    assert _open(place, text) or ADVICE.search(text), f"what is to be done? {text}"


def test_every_error_is_exported_and_on_its_page() -> None:
    found = vars(tokentrim.errors).items()
    kinds = {name for name, kind in found if isinstance(kind, type) and issubclass(kind, Exception)}
    kinds |= {"TokenTrimWarning"}
    assert kinds <= set(tokentrim.__all__)
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(TokenTrim\w+|\w+Error)`", page)) == kinds
