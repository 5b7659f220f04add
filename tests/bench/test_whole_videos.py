"""The tool that times whole videos goes on where it was broken off, and says what was timed and what was computed."""

import json
from argparse import Namespace

import pytest
import whole_videos as whole

ONCE = "30 % once"


def options(**changes):
    size = {"model": "reference", "grid": (2, 4), "layers": 1}
    values = {"chunks": 5, "calls": 2, "timed": [3, 4], "at": 3, "arms": [ONCE]}
    return Namespace(**{**size, **values, **changes})


def log_of(tmp_path, arms, chunks, calls):
    log = whole.Log(tmp_path / "log.jsonl")
    for arm, seconds in arms.items():
        for chunk in chunks:
            log.add(dtype="float32", arm=arm, chunk=chunk, seconds=seconds[:calls])
    return log


def test_a_run_goes_on_from_its_log_and_prunes_again_without_products(tmp_path):
    log = whole.Log(tmp_path / "log.jsonl")
    whole.measure(options(timed=[3]), "float32", log)
    first = len(log.rows)
    again = whole.Log(log.path)
    whole.measure(options(), "float32", again)
    assert [row for row in again.rows[first:] if "peak" in row] == [], "that is known"
    assert {row["chunk"] for row in again.rows[first:] if "chunk" in row} == {4}
    assert again.find(dtype="float32", arm=ONCE)["triggers"] == 1
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == again.rows
    by = whole.chunk_seconds(options(), "float32", again, 2)
    assert by.keys() == {whole.UNPATCHED, whole.AGAIN, ONCE} and all(len(times) == 2 for times in by.values())


@pytest.mark.parametrize(
    ("calls", "chunk", "expected"), [(2, 4, 4 * 10 + 3), (2, 3, 10 + 4 * 3), (3, 3, 10 + 3 * 3 + 2), (3, 4, 30 + 3 + 2)]
)
def test_further_calls_are_like_one_that_is_not_replayed(tmp_path, calls, chunk, expected):
    """The first call of the trigger's chunk was counted with its replay for each further one, too."""
    arms = {whole.UNPATCHED: [5.0, 3.0, 2.0], whole.AGAIN: [7.0, 3.0, 2.0], ONCE: [10.0, 3.0, 2.0]}
    log = log_of(tmp_path, arms, [chunk], calls)
    assert whole.chunk_seconds(options(calls=calls, timed=[chunk]), "float32", log, 5)[ONCE] == [expected]


def test_what_is_replayed_in_each_chunk_pays_for_that_once_per_chunk(tmp_path):
    arms = {name: [1.0, 1.0] for name in (whole.UNPATCHED, whole.AGAIN)} | {whole.EACH: [2.0, 1.0]}
    log = log_of(tmp_path, arms, [0, 4], 2)
    found = whole.chunk_seconds(options(arms=[whole.EACH], timed=[0, 4]), "float32", log, 5)
    assert found[whole.EACH] == [9.0, 6.0], "nothing is judged in chunk 0"


def test_the_interval_is_of_how_far_equal_arms_differ():
    assert whole.uncertainty({whole.UNPATCHED: [1.0, 2.0], whole.AGAIN: [1.0, 2.0]}) == 0
    one, four = (whole.uncertainty({whole.UNPATCHED: [1.1] * n, whole.AGAIN: [0.9] * n}) for n in (1, 4))
    assert one > 4 * four > 0


def test_the_share_that_breaks_even():
    assert whole.breaks_even({0.1: 1.01, 0.3: 0.97}) == pytest.approx(0.15)
    assert whole.breaks_even({0.1: 1.01, 0.3: 1.03}) is None
