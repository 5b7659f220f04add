"""The wording of results: what is better or worse, what is neither, what could not be measured."""

import dataclasses
import json

import pytest

from tokentrim_hooks.console import WIDTH, has_rich, plain_table, progress, show_table
from tokentrim_hooks.experiments.demo.measures import Cost, Fault, Line, Results, windows
from tokentrim_hooks.experiments.demo.runs import Size
from tokentrim_hooks.experiments.demo.table import as_json, as_text, number, remarks, rows_of
from tokentrim_hooks.metrics.intervals import Difference, paired_difference

GOOD = Line("chunks 1-4", "saturation error", "lower", Difference(0.4, 0.3, -0.1, -0.2, -0.05, 0.01, 0.02, 8))
BAD = Line("chunks 1-4", "sprites alive", "higher", Difference(0.6, 0.5, -0.1, -0.2, -0.05, 0.01, 0.02, 8))
OPEN = Line("chunks 5-8", "saturation error", "lower", Difference(0.4, 0.41, 0.01, -0.05, 0.07, 0.6, 0.6, 8))
NONE = Line("chunks 5-8", "sprites alive", "higher", paired_difference([], []))
COST = Cost(judged=200, triggered=10, tokens=70, rows=900, calls=100, extra=9, alone=0.01, clock=1.234)
RESULTS = Results(Size(), [GOOD, BAD, OPEN, NONE], COST, {"context": Fault([GOOD], 0.75, 0.02, COST)})


def test_rows_say_it_in_words():
    rows = rows_of([GOOD, BAD, OPEN, NONE])
    assert rows == [
        ["chunks 1-4", "", "", "", "", ""],
        ["  saturation error", "0.400", "0.300", "-0.100", "[-0.200, -0.050]", "better"],
        ["  sprites alive", "0.600", "0.500", "-0.100", "[-0.200, -0.050]", "worse"],
        ["chunks 5-8", "", "", "", "", ""],
        ["  saturation error", "0.400", "0.410", "+0.010", "[-0.050, +0.070]", "no difference shown"],
        ["  sprites alive", "-", "-", "-", "[-inf, +inf]", "too few pairs"],
    ]


def test_text_tells_triggers_and_costs():
    text = as_text(RESULTS)
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["pruned and regenerated"][3:] == ["10", "(5.0", "%)", "10", "(5.0", "%)"]
    assert lines["fault caught at once"][-2:] == ["75.0", "%"]
    assert lines["false alarms before the fault"][-2:] == ["2.0", "%"]
    assert lines["extra denoiser calls, each video alone"][-2:] == ["+1.0", "%"]
    assert lines["extra denoiser calls, this batch"][-2:] == ["+9.0", "%"]
    assert lines["wall clock, patched / unpatched"][-1] == "1.23"
    assert max(map(len, text.splitlines())) <= 120


def test_remarks_count_both_ways_and_own_up_to_nothing_happening():
    assert remarks(RESULTS)[-1].startswith("Of 4 comparisons 2 are better and 1 worse")
    idle = dataclasses.replace(RESULTS, drift_cost=dataclasses.replace(COST, triggered=0))
    assert len(remarks(RESULTS)) == 1 and "TokenTrim never pruned" in remarks(idle)[0]
    few = dataclasses.replace(RESULTS, drift=[NONE], fault={})
    assert remarks(few) == ["Fewer than 6 videos: no verdict on any difference."]


def test_rounding_never_hides_that_a_number_is_not_zero():
    assert [number(v, sign=True) for v in (0.0, 0.0004, -0.00002, 0.0005)] == ["+0.000", "+4e-04", "-2e-05", "+0.001"]


def test_json_is_strict_and_complete():
    data = json.loads(json.dumps(as_json(RESULTS, {"probe": "first-step"}), allow_nan=False))
    assert data["settings"]["probe"] == "first-step" and data["settings"]["chunks"] == Size().chunks
    verdicts = [line["verdict"] for line in data["drift"]]
    assert verdicts == ["better", "worse", "no difference shown", "too few pairs"]
    assert (data["drift"][3]["base"], data["drift"][3]["low"], data["drift"][3]["q"]) == (None, None, None)
    assert data["fault"]["context"]["at_once"] == 0.75 and data["fault"]["context"]["cost"]["extra"] == 9


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [(30, [(1, 10), (11, 20), (21, 30)]), (8, [(1, 3), (4, 5), (6, 8)]), (2, [(1, 1), (2, 2)]), (1, [(1, 1)])],
)
def test_windows_cover_every_chunk_once(chunks, expected):
    assert windows(chunks) == expected


def test_plain_table_wraps_only_its_last_column():
    lines = plain_table(["a", "why"], [["x" * 20, "word " * 40]]).splitlines()
    assert lines[0] == "a" + " " * 21 + "why"
    assert len(lines) > 3 and all(len(line) <= WIDTH for line in lines)
    assert all(line.startswith(" " * 22 + "word") for line in lines[3:])


def test_without_rich_it_is_plain(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    assert not has_rich()
    with progress("rolling out", 2) as advance:
        advance()
    show_table(["a", "b"], [["1", "2"]], "title")
    expected = ["rolling out ...", "rolling out: done", "title", "a  b", "-  -", "1  2"]
    assert capsys.readouterr().out.splitlines() == expected
