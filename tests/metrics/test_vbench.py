"""VBench import: its normalisation and weights, on scores whose totals can be worked out by hand."""

import json

import pytest

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.metrics.vbench import QUALITY, SEMANTIC, read_results, scores


def test_all_best_is_one_and_all_worst_is_zero():
    tables = {**QUALITY, **SEMANTIC}
    assert scores({name: high for name, (_, high, _) in tables.items()}).total == pytest.approx(1.0)
    assert scores({name: low for name, (low, _, _) in tables.items()}).total == pytest.approx(0.0)


def test_dynamic_degree_counts_half_and_total_is_four_to_one():
    raw = {name: low for name, (low, _, _) in {**QUALITY, **SEMANTIC}.items()}
    found = scores({**raw, "dynamic_degree": 1.0})
    assert found.quality == pytest.approx(0.5 / 6.5)
    assert found.total == pytest.approx(4 * 0.5 / 6.5 / 5)


def test_a_missing_dimension_is_not_a_zero():
    found = scores({name: 1.0 for name in QUALITY})
    assert found.quality is not None and found.semantic is None and found.total is None
    assert set(found.missing) == set(SEMANTIC)


def test_reads_vbench_files(tmp_path):
    one, two = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text(json.dumps({"subject_consistency": [0.9, [{"video": "x"}]]}))
    two.write_text(json.dumps({"motion smoothness": [0.98, []]}))
    assert read_results([one, two]) == {"subject_consistency": 0.9, "motion_smoothness": 0.98}


def test_what_is_no_dimension_is_not_looked_at(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"date": "2026-11-28", "my score": 3, "scene": [0.4, []]}))
    assert read_results([path]) == {"scene": 0.4}


def test_a_dimension_is_in_one_file_alone(tmp_path):
    one, two = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text('{"scene": [0.4, []]}')
    two.write_text('{"scene": [0.6, []]}')
    with pytest.raises(VideoError, match=r"b\.json has a score of scene, and so has a file before it"):
        read_results([one, two])


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": 3}', '{"a": ["x"]}', '{"scene": 3}', '{"scene": ["x"]}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(VideoError, match="not a VBench result"):
        read_results([path])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "71.5", "1e999", "-3", "1" + 400 * "0", 100_000 * "["])
def test_a_score_is_a_share_or_a_cosine(tmp_path, number):
    """A metric that failed leaves NaN; percentages would count a hundred times."""
    path = tmp_path / "x.json"
    path.write_text(f'{{"scene": [{number}, []]}}')
    with pytest.raises(VideoError, match=r"the score of scene is .{1,12}, not between -1 and 1|nested too deep"):
        read_results([path])
