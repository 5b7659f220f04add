"""Every Python block of README and docs runs, and prints what the page says; other blocks are at least well formed."""

import sys

import pytest
import tiny_reference as tiny
import torch
from pages import PAGES, ROOT, blocks, python_blocks

import tokentrim_hooks as tokentrim
from tokentrim_hooks.cli.script.choices import read_config

TUTORIAL = ROOT / "docs" / "writing-an-adapter.md"  # runs in test_tutorial.py
RUN = [page for page in PAGES if page != TUTORIAL and python_blocks(page)]


def given():
    """What a reader has: a pipeline (here a tiny one), noise for five chunks, a prompt."""
    torch.manual_seed(0)
    return {"pipeline": tiny.make(), "noise": torch.randn(1, 10, 3, 8, 8), "prompts": ["a"]}


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem, "tokentrim": tokentrim}
    for block in python_blocks(page):
        if not block.not_run:  # blocks of a tutorial go on from one another, others stand alone
            block.run(namespace if page.parent.name == "tutorial" else {**given(), **namespace})


def test_the_readme_begins_with_the_quick_start():
    """Which runs with the README's other blocks, output and all."""
    program = (ROOT / "examples" / "quickstart.py").read_text().split('"""', 2)[2]
    first = python_blocks(ROOT / "README.md")[0]
    assert first.code.strip() == program.strip() and first.output


def test_blocks_that_are_not_run_say_why():
    reasons = [block.not_run for page in PAGES for block in python_blocks(page) if block.comment.startswith("not run")]
    assert all(len(reason) > 10 for reason in reasons)


def test_there_are_blocks_and_each_is_found():
    """A fence that the expression overlooks would be a block that nobody runs."""
    for page in PAGES:
        fences = [line for line in page.read_text().splitlines() if line.startswith("```")]
        outputs = [block for block in blocks(page) if block.output is not None]
        assert len(fences) == 2 * (len(blocks(page)) + len(outputs)), page
    assert sum(len(python_blocks(page)) for page in RUN) >= 10


def test_a_wrong_output_is_noticed():
    block = next(block for page in RUN for block in python_blocks(page) if block.output)
    wrong = type(block)(block.page, block.line, "python", "print(1)", output="2\n")
    with pytest.raises(AssertionError, match="prints"):
        wrong.run({})


def test_the_configuration_file_of_the_command_line_page_is_read(tmp_path):
    toml = next(block for block in blocks(ROOT / "docs" / "cli.md") if block.language == "toml")
    (tmp_path / "run.toml").write_text(toml.code)
    assert read_config(tmp_path / "run.toml")["policy"]["persist"] is True


def test_no_page_names_this_machine():
    for page in [*PAGES, ROOT / "docs" / "checks.json"]:
        text = page.read_text()
        assert sys.prefix not in text and str(ROOT) not in text and "/tmp/" not in text, page
