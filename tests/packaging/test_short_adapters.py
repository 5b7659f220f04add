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
FIRST = {
    "anyflow-far": "a cache of full and compressed frames, built anew after every chunk in a call that hides, too",
    "fastvideo": "a stage whose cache is seen in arguments alone; for one transformer or two",
    "framepack": "samples backwards, too, and framepack-original takes all of that from it",
    "ltx-long": "a tail behind the window's own frames, which only the pipeline knows",
    "magi-1": "several chunks in flight, each of another noise level, over a memory of finished ones",
    "sana-wm": "caches joined anew for every chunk, whose frames a rotary embedding tells",
    "skyreels-v2": "a schedule of steps says which frames of a window are finished",
    "streamdiffusion-v2": "a ring, whose queues and counters every call moves",
}
"""What is the first of its kind, and why it is longer."""
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor a comment nor a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def ours() -> dict[str, type[Adapter]]:
    """The adapters of this package, without those of two that stand in the file of their first."""
    found = {info.name: info.adapter for info in tokentrim.adapters() if info.distribution.startswith(OURS)}
    return {name: kind for name, kind in found.items() if kind and name != "fastvideo-pair"}


def of_a_known_kind() -> dict[str, type[Adapter]]:
    """Those that derive from another model's, or from what several have in common."""
    return {name: kind for name, kind in ours().items() if _bases(kind) and name not in FIRST}


def _bases(kind: type) -> list[type]:
    """Those in other modules of the adapters' package."""
    home = kind.__module__.split(".")[0]
    return [base for base in kind.__mro__ if base.__module__ != kind.__module__ and base.__module__.startswith(home)]


@pytest.mark.parametrize("name", sorted(ours()))
def test_an_adapter_has_fewer_than_80_lines_of_code_or_is_the_first_of_its_kind(name: str) -> None:
    assert (lines_of_code(Path(inspect.getfile(ours()[name])).read_text()) < MOST) is (name not in FIRST)


def test_most_adapters_are_of_a_known_kind() -> None:
    assert len(of_a_known_kind()) >= 14 and {"causvid", "memrope", "framepack-original"} <= set(of_a_known_kind())


def test_lines_of_code_are_counted() -> None:
    assert lines_of_code('"""One.\n\nTwo.\n"""\n\n# Three.\nx = (\n    1,\n)\n"""Four."""\ny = 2  # Five.\n') == 4
