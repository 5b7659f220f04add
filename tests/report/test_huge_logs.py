"""A log of any length becomes a page of limited size in limited memory, and nothing of it goes uncounted."""

import json
import math
import random
import re
import tracemalloc

import numpy as np
import pytest

from tokentrim_hooks.cli.main import main
from tokentrim_hooks.report import record as records
from tokentrim_hooks.report.fields import KINDS
from tokentrim_hooks.report.floats import Floats
from tokentrim_hooks.report.page import gathering, writing
from tokentrim_hooks.report.page.charts import SIDE, cache_cells
from tokentrim_hooks.report.page.gathering import gather
from tokentrim_hooks.report.page.writing import write_page
from tokentrim_hooks.report.record import ChunkRecord, read_report, records_at, stream

GRID = (20, 20)


def line(chunk, sample=0, video=0, grid=GRID, **more):
    random = np.random.default_rng(chunk)
    tokens = tuple(range(0, grid[0] * grid[1], 10))
    given = {"severity": 1.0 + chunk % 7, "accepted_severity": 1.0, "threshold": 7.5, "mean": 2.0, "std": 1.0}
    drift = tuple(random.random(grid[0] * grid[1]).round(4).tolist())
    pruned = {"pruned": True, "dead": 120} if chunk % 20 == 9 else {}
    fields = {"tokens": tokens, "drift": drift, "grid": grid, **given, **pruned, **more}
    return ChunkRecord(video, chunk, sample, 3 * chunk, 3, {"first": 1}, **fields).as_json() + "\n"


def log_of(folder, chunks, **more):
    log = folder / "chunks.jsonl"
    with log.open("w") as file:
        file.writelines(line(chunk, **more) for chunk in range(chunks))
    return log


def test_memory_grows_by_a_small_record_per_chunk(tmp_path):
    def peak(chunks):
        log = log_of(tmp_path, chunks)
        tracemalloc.start()
        gather(stream(log))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(30)
    short, long = peak(100), peak(500)
    assert (long - short) / 400 < 2000, "400 tokens are 12,800 bytes as Python's floats, 1,600 packed"


def test_a_record_that_is_mapped_is_read_again_from_its_place(tmp_path):
    log = log_of(tmp_path, 40)
    (run,) = gather(stream(log)).runs
    again = list(records_at(log, run.places()))
    assert [r.chunk for r in again] == [9, 29] and all(len(r.drift) == 400 for r in again)
    assert not any(r.drift for r in run.records) and [len(r.tokens) for r in run.records if r.tokens] == [40, 40]
    whole = read_report(log).records
    assert again == [whole[9], whole[29]]


def test_what_lies_beyond_the_limits_is_counted_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "RECORDS", 30)
    html = write_page(log_of(tmp_path, 50).parent).read_text()
    assert "The log has 50 records; all are counted, the first 30 are shown." in html
    assert "3 of 50 judged chunks were regenerated" in html


def test_of_many_samples_some_are_drawn_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "DRAWN", 2)
    monkeypatch.setattr(writing, "LISTED", 4)
    with (tmp_path / "chunks.jsonl").open("w") as file:
        file.writelines(line(chunk, sample, grid=(1, 2)) for chunk in range(3) for sample in range(6))
    html = write_page(tmp_path).read_text()
    assert "The first 2 of 6 samples are drawn." in html and html.count('class="chart"') == 2
    assert html.count("not drawn") == 2 and "none of 18 judged chunks of 6 samples was regenerated" in html


def test_how_long_a_large_log_takes_is_said_before_it_is_read(tmp_path, monkeypatch, capsys):
    log = log_of(tmp_path, 3, grid=(1, 2))
    assert main(["report", str(tmp_path)]) == 0 and not capsys.readouterr().err
    monkeypatch.setattr("tokentrim_hooks.cli.report.LARGE", 100)
    monkeypatch.setattr("tokentrim_hooks.cli.report.PER_SECOND", log.stat().st_size / 7)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"tokentrim report: {log} has 0.0 GB, which takes about 7 seconds to read\n"


def test_samples_that_cannot_be_told_apart_any_more_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "RUNS", 3)
    with (tmp_path / "chunks.jsonl").open("w") as file:
        file.writelines(line(1, video=video, grid=(1, 2)) for video in range(9))
    found = gather(stream(tmp_path / "chunks.jsonl"))
    assert (len(found.runs), found.kept, found.tally.records) == (3, 3, 9)


def test_a_table_of_many_chunks_says_how_many_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr("tokentrim_hooks.report.page.parts.ROWS", 40)
    html = write_page(log_of(tmp_path, 100, grid=(1, 2)).parent).read_text()
    assert "<summary>40 of 100 chunks</summary>" in html
    assert html.count('<tr class="pruned">') == 5, "all of those that were pruned"


def test_long_notes_and_settings_are_cut(tmp_path):
    log_of(tmp_path, 3, grid=(1, 2), notes=("word " * 100_000,) * 50)
    (tmp_path / "settings.json").write_text(json.dumps({"x": "y" * 3_000_000}))
    html = write_page(tmp_path).read_text()
    assert len(html) < 400_000 and "cut off here: see settings.json" in html


@pytest.mark.parametrize(("tokens", "chunks"), [(3 * SIDE, 4), (4, 3 * SIDE + 1), (10, 10)])
def test_a_large_cache_map_is_pooled_and_loses_no_prune(tokens, chunks):
    def record(chunk, **more):
        return ChunkRecord(0, chunk, 0, 3 * chunk, 3, {}, grid=(1, tokens), **more)

    prune = {"pruned": True, "tokens": (tokens - 1,), "dead": 3}
    cells = cache_cells([*(record(i) for i in range(chunks - 1)), record(chunks - 1, **prune)])
    assert max(cells.shape) <= SIDE and (cells == 2).sum() == 1
    row, column = np.argwhere(cells == 2)[0]
    assert row == cells.shape[0] - 1 and column >= cells.shape[1] - 2


def test_a_file_that_is_cut_off_while_it_is_read_again(tmp_path):
    log = log_of(tmp_path, 3, grid=(1, 2))
    places = [place for place, _ in stream(log)]
    log.write_text(log.read_text()[:-40])
    assert [r.chunk for r in records_at(log, places)] == [0, 1]


def test_an_error_names_the_line(tmp_path):
    log = log_of(tmp_path, 2, grid=(1, 2))
    log.write_text(log.read_text() + "\n\nnonsense\n")
    with pytest.raises(records.ReportError, match=re.escape(f"{log}:5 is not a chunk record")):
        list(stream(log))


def test_numbers_are_checked_alike_however_they_come():
    """A list of plain numbers is looked at as a whole; what it holds decides, and no other way of asking."""
    choice, values = random.Random(3), [0.0, 1.5, -2, math.nan, math.inf, None, True, 1e29, 1e31, 10**400, -1e31, "x"]
    drift, one = KINDS["drift"][1], KINDS["seconds"][1]

    def outcome(check, value):
        try:
            return [float(part) for part in check(value)]
        except Exception as failure:
            return type(failure).__name__

    for _ in range(3000):
        given = [choice.choice(values) for _ in range(choice.randint(1, 4))]
        singly, whole = outcome(lambda parts: [one(part) for part in parts], given), outcome(drift, given)
        assert repr(whole) == repr(outcome(Floats, singly) if isinstance(singly, list) else singly), given
