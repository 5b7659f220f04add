"""Records and reports: strict JSON, honest sums."""

import json
import math

import torch

from tokentrim_hooks import ChunkRecord, JsonLines, Report
from tokentrim_hooks.report.record import read_report


def record(chunk, **values):
    return ChunkRecord(0, chunk, 0, 3 * chunk, 3, {"first": 1, "refine": 3, "commit": 1}, **values)


def test_json_has_no_infinity():
    line = record(0, severity=1.5, threshold=math.inf, mean=math.nan).as_json()
    values = json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert (values["severity"], values["threshold"], values["mean"]) == (1.5, None, None)
    assert values["phases"] == {"first": 1, "refine": 3, "commit": 1}


def test_json_has_no_infinity_within_lists_either():
    """An observer's or a policy's numbers go through as they are: one that is not finite must not cost the log."""
    line = ChunkRecord(0, 1, 0, 3, 3, {"first": math.inf}, drift=(1.0, math.nan, math.inf)).as_json()
    values = json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert values["drift"] == [1.0, None, None] and values["phases"] == {"first": None}


def test_summary_counts():
    pruned = record(2, severity=4.0, pruned=True, tokens=(1, 2), dead=12, regenerations=1, extra_calls=1)
    report = Report({}, [record(0), record(1, severity=1.0), pruned])
    text = report.summary()
    assert report.triggers == 1 and len(report) == 3
    assert "3 chunk records, 2 judged, 1 pruned" in text
    assert "positions pruned 2, context rows dead 12" in text
    assert "calls 15 + 1 extra (6.7 %)" in text
    assert Report().summary() == "tokentrim: no chunk seen yet"


def test_a_report_that_is_shown_fits_on_a_line_of_a_screen():
    """In a notebook and at the prompt: not its records, which may be thousands with a thousand drifts each."""
    records = [record(n, drift=(0.5,) * 1560) for n in range(99)]
    long = Report({"adapter": "self-forcing", "policy": "DriftPolicy"}, records)
    assert repr(long) == (
        "<Report self-forcing, DriftPolicy: tokentrim: 99 chunk records, 0 judged, 0 pruned; see summary()>"
    )
    assert repr(Report()) == "<Report tokentrim: no chunk seen yet; see summary()>"


def test_save_writes_one_line_a_record(tmp_path):
    folder = Report({"adapter": "x"}, [record(0), record(1)]).save(tmp_path / "deep" / "run")
    lines = (folder / "chunks.jsonl").read_text().splitlines()
    assert [json.loads(line)["chunk"] for line in lines] == [0, 1]
    assert json.loads((folder / "settings.json").read_text()) == {"adapter": "x"}


def test_a_log_that_a_crash_cut_off_can_be_continued(tmp_path):
    (tmp_path / "chunks.jsonl").write_text(record(0).as_json() + '\n{"video": 0, "chu')
    log = JsonLines(tmp_path, append=True)
    log.on_chunk([record(0)], torch.zeros(1))
    log.on_end()
    assert len(read_report(tmp_path)) == 2
