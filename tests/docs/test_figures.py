"""What README and docs say of the reference model stands in the tables of docs/reference-results.md, to the digit."""

import re

import pytest
from pages import ROOT

RESULTS = "docs/reference-results.md"
PAGES = ["README.md", "docs/policies.md", "docs/how-to/choose-a-policy.md", RESULTS]
NUMBER = r"\d+\.\d+"
TUNING = "- **What was tried for it"
"""Begins paragraphs whose figures are of tuning seeds, which no table reports."""


def cells(line):
    return [cell.strip() for cell in line.strip("|\n ").split("|")]


def tables():
    """Per table of outcomes its rows: ``{column: cell}``, the unpatched one first."""
    found, head = [], None
    for line in (ROOT / RESULTS).read_text().splitlines():
        if line.startswith("| setting | pairs |"):
            head = cells(line)
            found.append([])
        elif head and line.startswith("| ") and not line.startswith("| ---"):
            found[-1].append(dict(zip(head, cells(line), strict=True)))
        elif not line.startswith("|"):
            head = None
    return found


TABLES = tables()
CELLS = [(rows[0], column, cell) for rows in TABLES for row in rows[1:] for column, cell in row.items()]
EFFECTS = {(cell.split()[0], off[column]) for off, column, cell in CELLS if re.match(r"[+-].* \[", cell)}
CAUGHT = {round(float(cell[:-2])) for _, column, cell in CELLS if column.startswith("chunk ") and cell != "-"}
PRUNED = {cell for _, column, cell in CELLS if column == "pruned"}
EXTRA = {cell for _, column, cell in CELLS if column == "extra calls"}


def prose(page):
    """A page without its tables of outcomes and blocks of code, one paragraph per item, white space made one."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = ["" if re.match(r"\| .*\[[+-]", line) or line.startswith("| off ") else line for line in text.splitlines()]
    parts = re.split(r"\n\s*\n|\n(?=[-|] )", "\n".join(lines))
    return [re.sub(r"\s+", " ", part) for part in parts if not part.strip().startswith(TUNING)]


def of_a_base(part):
    """(effect, base) as they are written: ``-0.1 of 0.3``, ``0.1 lower (of 0.3)``, ``by 0.1 of 0.3``, ``0.3 - 0.1``."""
    for effect, base in re.findall(rf"([+-]{NUMBER})(?: late)? \(?of ({NUMBER})", part):
        yield effect, base
    for effect, word, base in re.findall(rf"({NUMBER}) (lower|larger|higher) \(?of ({NUMBER})", part):
        yield ("-" if word == "lower" else "+") + effect, base
    for base, sign, effect in re.findall(rf"\b({NUMBER}) ([+-]) ({NUMBER})", part):
        yield sign + effect, base


@pytest.mark.parametrize("page", PAGES)
def test_an_effect_of_a_base_is_a_cell_of_a_table(page):
    found = [pair for part in prose(page) for pair in of_a_base(part)]
    assert found or "choose" in page
    assert {pair for pair in found if pair not in EFFECTS} == set()


@pytest.mark.parametrize("page", PAGES)
def test_an_effect_without_its_base_is_a_cell_too(page):
    known = {effect for effect, _ in EFFECTS}
    found = {effect for part in prose(page) for effect in re.findall(r"(?<![\d\[])[+-]\d\.\d{3}\b", part)}
    assert found - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_a_share_that_is_caught_is_one_of_a_table(page):
    found = {int(share) for part in prose(page) for share in re.findall(r"caught (?:at once )?in (\d+) ?%", part)}
    assert found and found <= CAUGHT


@pytest.mark.parametrize("page", PAGES)
def test_shares_of_chunks_and_calls_are_cells_too(page):
    for words, known in (("of the chunks", PRUNED), ("more calls", EXTRA)):
        for part in prose(page):
            assert {f"{share} %" for share in re.findall(rf"(\d+\.\d) % {words}", part)} <= known, part


def test_the_tables_are_found():
    assert len(TABLES) > 40 and ("-0.158", "0.300") in EFFECTS and {3, 77, 86, 92} <= CAUGHT
