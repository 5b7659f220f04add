"""The public face: the modules whose names anybody may use, said in docs/api.md and nowhere else."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from pages import PAGES, python_blocks

ROOT = Path(__file__).parents[2]
PUBLIC_MODULES = {
    "tokentrim_hooks",
    "tokentrim_hooks.testing",
    "tokentrim_hooks.reference",
    "tokentrim_hooks.experiments.compare",
}
"""As docs/api.md says."""


def imports(source):
    """(module, name) pairs of all absolute imports of a source text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def outsiders():
    """Sources that may use public names only: adapters, examples, Python blocks of the pages."""
    for folder in ("adapters", "examples"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield pytest.param(file.read_text(encoding="utf-8"), id=str(file.relative_to(ROOT)))
    for page in PAGES:
        whole = [block.code for block in python_blocks(page) if not block.comment]
        yield pytest.param("\n".join(whole), id=page.name)


@pytest.mark.parametrize("source", list(outsiders()))
def test_only_public_names_are_used(source):
    for module, name in imports(source):
        if module.split(".")[0] == "tokentrim_hooks":
            assert module in PUBLIC_MODULES, f"{module} is private"
            public = importlib.import_module(module).__all__
            assert name is None or name in public, f"{name} is not public in {module}"


@pytest.mark.parametrize("module", sorted(PUBLIC_MODULES))
def test_public_names_exist(module):
    public = importlib.import_module(module)
    assert [name for name in public.__all__ if not hasattr(public, name)] == []


def test_the_docs_say_what_is_public():
    section = (ROOT / "docs" / "api.md").read_text().split("\n## ")[0]
    assert set(re.findall(r"`(tokentrim_hooks[\w.]*)`", section)) == PUBLIC_MODULES
