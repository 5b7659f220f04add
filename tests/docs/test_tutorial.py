"""The tutorial, done: its file grows part by part as the page says, its blocks run, its file is the example's."""

import importlib
import shutil
import sys

import pytest
from pages import ROOT, blocks, python_blocks

from tokentrim_hooks import plugins

PAGE = ROOT / "docs" / "writing-an-adapter.md"
EXAMPLE = ROOT / "examples" / "third_party_adapter"
FILE = "ribbon_tokentrim.py"


def installed_editable(folder):
    """The model and the metadata that `pip install -e .` leaves, in a folder to be put on sys.path."""
    shutil.copytree(EXAMPLE / "ribbon", folder / "ribbon", ignore=shutil.ignore_patterns("__pycache__"))
    info = folder / "ribbon_tokentrim-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ribbon-tokentrim\nVersion: 0.1.0\n")
    toml = next(block.code for block in blocks(PAGE) if block.language == "toml")
    assert toml.strip() in (EXAMPLE / "pyproject.toml").read_text(), "the example's entry point reads otherwise"
    (info / "entry_points.txt").write_text("[tokentrim_hooks]\nribbon = ribbon_tokentrim\n")


def forget():
    """As a new process would: no module of the tutorial, no list of adapters."""
    sys.modules.pop("ribbon_tokentrim", None)
    importlib.invalidate_caches()
    plugins.found.cache_clear()


@pytest.fixture
def site(tmp_path, monkeypatch):
    installed_editable(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the file changes within a second
    monkeypatch.chdir(tmp_path)
    forget()
    yield tmp_path
    for name in ("ribbon", "ribbon.model"):
        sys.modules.pop(name, None)
    forget()


def test_the_tutorial_ends_with_a_green_kit(site):
    namespace, missing = {"__name__": "tutorial"}, []
    for block in python_blocks(PAGE):
        if block.comment != FILE:
            block.run(namespace)
            continue
        with (site / FILE).open("a") as file:
            file.write(block.code + "\n")
        forget()
        info = {info.name: info for info in plugins.found().adapters}["ribbon"]
        missing.append(info.error)
    assert all("give it a hookimpl" in error for error in missing[:-1]), "an unfinished file says what it lacks"
    assert missing[-1] == "" and len(missing) > 3


def test_the_tutorials_file_is_the_examples():
    parts = "".join(block.code for block in python_blocks(PAGE) if block.comment == FILE)
    lines = [line for line in (EXAMPLE / FILE).read_text().splitlines() if line]
    assert [line for line in parts.splitlines() if line] == lines


def test_its_kit_is_the_examples_kit():
    page = PAGE.read_text()
    for line in ("chunks = 8", "torch.manual_seed(seed)", "return model.generate(torch.randn(1, 16, 4, 8, 8))"):
        assert line in page and line in (EXAMPLE / "tests" / "test_conformance.py").read_text()
