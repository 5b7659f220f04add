"""docs/measures.md is what the measures give, to the last digit but one, and no cell is bold without a right to it."""

import re

import measures_page as page
import pytest

NUMBER = re.compile(r"(?<![\w-])-?\d+(?:\.\d+)?(?![\w-])")


PLACES = re.findall(r"^<!-- ([\w-]+): generated", page.PAGE.read_text(), re.MULTILINE)
"""Not asked of the tool: collecting tests must not measure."""


def split(text):
    return NUMBER.split(text), [float(number) for number in NUMBER.findall(text)]


def test_every_table_has_its_place():
    assert sorted(PLACES) == sorted(page.blocks())


@pytest.mark.parametrize("block", PLACES)
def test_the_page_is_what_is_generated(block):
    text = page.PAGE.read_text()
    found = re.search(rf"<!-- {block}: generated.*?-->\n(.*?)<!-- end {block} -->", text, re.DOTALL)[1].strip()
    (words, numbers), (new_words, new_numbers) = split(found), split(page.blocks()[block])
    assert words == new_words, "run python tools/measures_page.py --write"
    # Another processor may round a pixel to the other side of a threshold.
    assert numbers == pytest.approx(new_numbers, rel=0.02, abs=0.02 if "steps" in block else 1)


def test_a_place_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="found 0"):
        page.filled("no place here", "matrix", "table")


def test_writing_again_changes_nothing():
    text = page.PAGE.read_text()
    for block, content in page.blocks().items():
        once = page.filled(text, block, content)
        assert page.filled(once, block, content) == once and content in once
