"""What tools/mutants.py plants can still be planted, and the tests it names exist; whether they fail it says itself."""

import re
from pathlib import Path

from planted import MUTANTS

ROOT = Path(__file__).parents[2]


def test_every_text_occurs_once_and_is_changed():
    assert len(MUTANTS) >= 25
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text()
        assert source.count(mutant.old) == 1, f"{mutant.file}: {mutant.old!r} occurs {source.count(mutant.old)} times"
        compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")
        assert mutant.new != mutant.old and "\n" not in mutant.means


def test_every_mutant_has_a_test_that_exists():
    for mutant in MUTANTS:
        assert mutant.tests
        for node in mutant.tests:
            file, name = node.split("::")
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), node
