"""Every ``tokentrim`` command that README and docs show is one that the command line takes."""

import shlex

import pytest
from pages import PAGES, blocks

from tokentrim_hooks.cli import main as cli

SHOWN = [
    (page.name, line.removeprefix("$ "))
    for page in PAGES
    for block in blocks(page)
    if block.language == "console"
    for line in block.code.splitlines()
    if line.startswith("$ tokentrim ")
]


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_is_taken(page, line):
    options = cli.parser().parse_args(shlex.split(line, comments=True)[1:])
    assert options.command in cli.COMMANDS


def test_scripts_keep_their_own_arguments():
    runs = [cli.parser().parse_args(shlex.split(line)[1:]) for _, line in SHOWN if line.startswith("tokentrim run ")]
    assert {str(run.script): run.arguments[0] for run in runs} == {
        "inference.py": "--config_path",
        "generate.py": "--model",
    }
    assert {str(run.out) for run in runs} == {"runs/lighthouse", "runs/skyreels"}
