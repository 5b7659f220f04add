"""CONTRIBUTING.md draws the house as it stands: its layers are the contract's, every room and module has a line."""

import functools
import importlib
import re
import shutil
import subprocess

import pytest
from pages import PAGES, ROOT, blocks

PAGE = ROOT / "CONTRIBUTING.md"
PACKAGE = ROOT / "tokentrim_hooks"


def test_the_layers_are_the_contracts():
    drawn = blocks(PAGE)[0].code.replace(" · ", " | ").splitlines()
    toml = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"^layers = \[\n(.*?)^\]", toml, re.MULTILINE | re.DOTALL)[1]
    assert drawn == re.findall(r'"(.+)"', layers)


def test_every_room_and_every_module_has_a_line():
    text = PAGE.read_text()
    firsts = " ".join(re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE))
    rooms = {path.parent.name + "/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert set(re.findall(r"`(.+?)`", firsts)) == rooms | modules


PATH = re.findall(r"^\| \w+ \| `(\S+):(\S+)` \|", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("module", "name"), PATH)
def test_the_path_of_the_latents_goes_through_code_that_is_there(module, name):
    home = importlib.import_module(f"tokentrim_hooks.{module}")
    assert callable(functools.reduce(getattr, name.split("."), home))


TOP = {
    *(".ci", "adapters", "docs", "examples", "tests", "tokentrim_hooks", "tools"),
    *(".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
    *("constraints.txt", "mkdocs.yml", "pyproject.toml"),
}


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="NOT CHECKED: no checkout of git's")
def test_nothing_else_stands_at_the_top():
    """What a tool leaves where it runs is no part of the project."""
    command = ["git", "-c", "safe.directory=*", "ls-files"]  # whoever owns it
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.partition("/")[0] for name in listed.splitlines()} == TOP


def test_there_is_a_path():
    assert len(PATH) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_can_be_read_in_a_terminal(page):
    """But for tables, which Markdown cannot wrap; in the README, which is read as it stands, they are narrow, too."""
    lines = page.read_text().splitlines()
    tables = page.name != "README.md"
    assert [line for line in lines if len(line) > 120 and not (tables and line.lstrip().startswith("|"))] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
