"""The example notebook runs, prints what it shows, and is the tutorial."""

import nbformat
import notebook
import pytest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return notebook.made(tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(notebook.NOTEBOOK, as_version=4)


def test_it_prints_what_it_shows(run, committed):
    assert notebook.printed(run) == notebook.printed(committed), "run python tools/notebook.py --write"


def test_it_shows_a_picture(run, committed):
    for book in (run, committed):
        outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)


def test_its_links_lead_somewhere(committed):
    links = [link for cell in committed.cells for link in notebook.re.findall(r"\]\((\.\./[^)#]+)", cell.source)]
    assert links and all((notebook.NOTEBOOK.parent / link).exists() for link in links)
