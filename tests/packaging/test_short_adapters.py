"""An adapter for a model of a known kind is short: what two of them need stands in a helper, or in the first one."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from pathlib import Path

import pytest

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Adapter

MOST, OURS = 80, "tokentrim-hooks "
FIRST = {"framepack": "samples backwards, too, and framepack-original takes all of that from it"}
"""What is the first of its kind: why it is longer."""
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor a comment nor a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def of_a_known_kind() -> dict[str, type[Adapter]]:
    """The adapters of this package that derive from another model's, or from what several have in common."""
    found = {info.name: info.adapter for info in tokentrim.adapters() if info.distribution.startswith(OURS)}
    return {name: kind for name, kind in found.items() if kind and _bases(kind) and name not in FIRST}


def _bases(kind: type) -> list[type]:
    """Those in other modules of the adapters' package."""
    home = kind.__module__.split(".")[0]
    return [base for base in kind.__mro__ if base.__module__ != kind.__module__ and base.__module__.startswith(home)]


@pytest.mark.parametrize("name", sorted(of_a_known_kind()))
def test_an_adapter_for_a_model_of_a_known_kind_has_fewer_than_80_lines_of_code(name: str) -> None:
    assert lines_of_code(Path(inspect.getfile(of_a_known_kind()[name])).read_text()) < MOST


def test_most_adapters_are_of_a_known_kind() -> None:
    assert len(of_a_known_kind()) >= 14 and {"causvid", "memrope", "framepack-original"} <= set(of_a_known_kind())


def test_lines_of_code_are_counted() -> None:
    assert lines_of_code('"""One.\n\nTwo.\n"""\n\n# Three.\nx = (\n    1,\n)\n"""Four."""\ny = 2  # Five.\n') == 4
