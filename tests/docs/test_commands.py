"""Every command that README, CONTRIBUTING and docs show is one that can be given: tokentrim, make, pytest, tools."""

import shlex

import pytest
from pages import PAGES, ROOT, blocks

from tokentrim_hooks.cli import main as cli

LINES = [
    (page.name, line.removeprefix("$ "))
    for page in PAGES
    for block in blocks(page)
    if block.language == "console"
    for line in block.code.replace("\\\n", "").splitlines()
    if line.startswith("$ ")
]
ELSEWHERE = ("pip install ", "uv pip install ", "cd ", "chromium ")
"""Beginnings of commands that belong to other programs."""


def shown(start):
    return [(page, line) for page, line in LINES if line.startswith(start)]


def parsed(line):
    """The command that a line names, and its parameters by name; raises where it could not be given."""
    name, *arguments = shlex.split(line.partition(" >> ")[0], comments=True)[1:]
    return name, cli.COMMANDS[name].make_context(name, arguments).params


@pytest.mark.parametrize(("page", "line"), shown("tokentrim "))
def test_is_taken(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in shlex.split(line, comments=True):
        if word.endswith(".mp4"):
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).touch()
    parsed(line)


def test_scripts_keep_their_own_arguments():
    runs = [parsed(line)[1] for _, line in shown("tokentrim run ")]
    assert {run["script"]: run["arguments"][0] for run in runs} == {
        "inference.py": "--config_path",
        "generate.py": "--model",
    }
    assert {str(run["out"]) for run in runs} == {"runs/lighthouse", "runs/skyreels"}


@pytest.mark.parametrize(("page", "line"), shown("make "))
def test_the_makefile_has_it(page, line):
    target = shlex.split(line, comments=True)[1]
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(("page", "line"), shown(".venv/bin/python "))
def test_its_file_is_there(page, line):
    words = shlex.split(line, comments=True)[1:]
    path, _, test = (words[2] if words[:2] == ["-m", "pytest"] else words[0]).partition("::")
    assert (ROOT / path).exists()
    assert not test or f"\ndef {test}(" in (ROOT / path).read_text()


def test_no_command_is_overlooked():
    known = ("tokentrim ", "make ", ".venv/bin/python ", *ELSEWHERE)
    assert [line for _, line in LINES if not line.startswith(known)] == []
    assert len(LINES) > 20
