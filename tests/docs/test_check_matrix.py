"""Outcomes of tests become records, records cells: failures are told, what did not run is not called passed."""

import json

import check_matrix
import record_checks
from tokentrim_hooks_adapters.causvid import CausVid

pytest_plugins = ["pytester"]

STAMP = {"commit": "abc", "date": "2026-01-01", "versions": {}}


def record(outcomes, suite="s", figures=None, **stamp):
    return {"adapter": "causvid", "suite": suite, **STAMP, **stamp, "outcomes": outcomes, "figures": figures or {}}


def test_every_column_has_its_tests_in_the_kit():
    from tokentrim_hooks.testing import AdapterConformance

    assert [test for test in record_checks.OF_TEST if not hasattr(AdapterConformance, test)] == []
    told = {*check_matrix.HEADS, *check_matrix.HOOKS} - {"hooks"}
    assert told == record_checks.COLUMNS.keys()


def test_cells():
    def cell(*ends):
        tests = {str(number): end for number, end in enumerate(ends)}
        return check_matrix.cell([record({"exact": tests} if ends else {})], "exact")

    assert cell() == cell("not checked") == "not checked"
    assert cell("passed", "passed") == "yes"
    assert cell("passed", "not checked") == "in part (1 of 2)"
    assert cell("passed", "failed") == "**fails** (1 of 2)"


def test_what_an_adapter_refuses_is_not_offered():
    """Nor is a test left out of another column that needs it."""
    whole, finished = record_checks.COLUMNS["neutral"]
    ends = {"neutral": {whole: "passed", finished: "not checked"}, "candidate": {"a": "not checked"}}
    kit, columns = record(ends, suite="t::K"), ("neutral", "candidate")
    cells = [[check_matrix.cell([kit], column, offered) for column in columns] for offered in (False, True)]
    assert cells == [["yes", "not offered"], ["in part (1 of 2)", "not checked"]]
    assert check_matrix.cell([record({"neutral": {whole: "failed"}})], "neutral", offered=False) == "**fails** (1 of 1)"


def test_a_kit_of_which_a_test_was_left_out_is_in_part():
    half = record({"exact": {record_checks.COLUMNS["exact"][0]: "passed"}}, suite="test_it.py::TestKit")
    assert check_matrix.cell([half], "exact") == "in part (1 of 2)"


def test_an_adapter_without_records_is_not_checked():
    table = check_matrix.matrix([record({"exact": {"a": "passed"}}, figures={"a": [0.1, 2e-6]})], ["causvid", "x"], {})
    known, unknown, suite = [line for line in table.splitlines() if line.startswith("| `")]
    assert "| yes |" in known and "2.0e-06" in known
    assert unknown.count("not checked") == len(check_matrix.HEADS) and "yes" not in unknown
    assert suite == "| `causvid` | `s` | exact | abc 2026-01-01 |"


def test_suites_of_an_adapter_share_a_row():
    """A suite that measures exactness alone says nothing of what another one has found."""
    suites = [record({"exact": {"a": "passed"}}), record({"undone": {"b": "passed"}}, suite="t")]
    row = next(line for line in check_matrix.matrix(suites, ["causvid"], {}).splitlines() if line.startswith("| `"))
    assert row.split(" | ")[1:4] == ["yes", "not checked", "yes"]


def test_what_ran_again_replaces_and_the_rest_stands_with_its_own_commit():
    old = record({"exact": {"a": "passed", "b": "passed"}}, figures={"a": [1, 2], "b": [3, 4]})
    new = record({"exact": {"a": "failed"}}, commit="def")
    kept, found = record_checks.merged([old], [new])
    assert kept["outcomes"] == {"exact": {"b": "passed"}} and kept["figures"] == {"b": [3, 4]}
    assert found == new
    assert check_matrix.cell([kept, found], "exact") == "**fails** (1 of 2)"
    assert record_checks.merged([kept, found], [old]) == [old]


def test_a_suite_of_which_nothing_ran_changes_nothing():
    old = record({"exact": {"a": "passed"}})
    assert record_checks.merged([old], [record({"exact": {"a": "not checked"}}, commit="def")]) == [old]


SUITE = """
import pytest
from tokentrim_hooks_adapters.causvid import CausVid

class TestKit:
    adapter = CausVid
    def test_observing_changes_no_bit(self): pass
    def test_unpatching_leaves_no_trace(self): assert False
    def test_a_candidate_prune_equals_minus_infinity(self): pytest.skip("NOT CHECKED: no")
    def test_of_no_column(self): pass

class TestOther(TestKit):
    adapter = type("Stranger", (CausVid,), {})

@pytest.mark.checks("causvid", "exact")
def test_marked(record_property): record_property("exact", ("name", 0.5, 1.23e-6))

@pytest.mark.checks("causvid", "exact")
def test_marked_with_its_module_but_no_comparison(): pass

def test_that_says_so_while_it_runs(record_property):
    record_property("checks", ("causvid", "test_other.py", "hide", "told"))
    assert False

def test_that_has_others_record(pytestconfig):
    from record_checks import passed_on
    print("options:", *passed_on(pytestconfig))
"""


def test_a_run_is_recorded(pytester):
    pytester.makeconftest("from record_checks import pytest_addoption, pytest_configure")
    pytester.makepyfile(test_it=SUITE)
    pytester.path.joinpath("checks.json").write_text('{"device": "ours"}')
    file = pytester.path.joinpath("checks.json")
    run = pytester.runpytest("--record-checks", "checks.json", "-p", "no:cacheprovider", "-s")
    run.stdout.fnmatch_lines(["*options: -p record_checks --record-checks */checks.json*"])
    known = json.loads(file.read_text())
    marked, kit, told = known["tests"]
    assert (told["suite"], told["outcomes"]) == ("test_other.py", {"hide": {"told": "failed"}})
    assert known["device"] == "ours" and CausVid.name == kit["adapter"] == marked["adapter"]
    assert (marked["suite"], kit["suite"]) == ("test_it.py", "test_it.py::TestKit")
    assert marked["outcomes"] == {"exact": {"test_marked": "passed"}}
    assert marked["figures"] == {"test_marked": [0.5, 1.2e-6]}
    assert {column: [*tests.values()] for column, tests in kit["outcomes"].items()} == {
        "neutral": ["passed"], "undone": ["failed"], "candidate": ["not checked"],
    }  # fmt: skip
    assert kit["commit"] and kit["date"] and "torch" in kit["versions"]
