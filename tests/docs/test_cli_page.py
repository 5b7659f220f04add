"""docs/cli.md says of every command what the command itself says."""

import re

import cli_page as page
import pytest


@pytest.mark.parametrize("name", page.COMMANDS)
def test_the_page_is_what_is_generated(name):
    text = page.PAGE.read_text()
    section = text.split(f"\n## tokentrim {name}\n")[1].split("\n## ")[0]
    found = re.search(rf"<!-- {name}: generated.*?-->\n(.*?)\n<!-- end {name} -->", section, re.DOTALL)
    assert found and found[1] == page.block(name, page.COMMANDS[name]), "run python tools/cli_page.py --write"


def test_every_option_is_explained():
    for name, command in page.COMMANDS.items():
        for option in command.params:
            if isinstance(option, page.click.Option):
                assert option.help and len(option.help) > 5, (name, option.name)


def test_a_place_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="found 0"):
        page.filled("no place here", "run", "table")
