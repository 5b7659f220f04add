"""The log while a run goes on, what a crash leaves, and the page that is made of it."""

import re
import warnings

import numpy as np
import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.cli import main
from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.page import render, write_page
from tokentrim_hooks.pictures import cache_cells
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.report import ChunkRecord, Report, read_report
from tokentrim_hooks.testing import ForcedPolicy
from tokentrim_hooks.thumbnails import Thumbnails


def generate(folder, chunks=6, batch=1, grid=(2, 3), policy=None, extra=()):
    pipeline = ReferencePipeline.random(grid=grid)
    torch.manual_seed(1)
    noise = torch.randn(batch, 3 * chunks, 3, 4 * grid[0], 4 * grid[1])
    policy = policy or ForcedPolicy(at={3: [1, 4]})
    with tokentrim.patched(pipeline, policy, observers=[tokentrim.JsonLines(folder), *extra]) as handle:
        pipeline.inference(noise)
        return handle.report


def test_log_equals_report(tmp_path):
    report = generate(tmp_path, batch=2)
    again = read_report(tmp_path)
    assert again.settings["adapter"] == "self-forcing"
    assert [r.tokens for r in again] == [r.tokens for r in report]
    assert [r.severity for r in again] == [r.severity for r in report]
    assert again.records[0].mean is None, "no severity came before the first judged chunk"


def test_chunks_are_in_the_log_as_soon_as_they_are_committed(tmp_path):
    class Killed(Exception):
        pass

    class Kill:
        def on_chunk(self, records, latents):
            if records[0].chunk == 3:
                lines = (tmp_path / "chunks.jsonl").read_text().splitlines()
                raise Killed(f"{len(lines)} lines")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(tmp_path, extra=[Kill()])
    messages = [str(w.message) for w in caught if issubclass(w.category, tokentrim.TokenTrimWarning)]
    assert len(messages) == 1 and "Kill failed in on_chunk" in messages[0] and "4 lines" in messages[0]
    assert len(read_report(tmp_path)) == 6, "a failing observer costs neither the run nor the log"


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_log_cut_off_by_a_crash_is_readable(tmp_path, cut):
    generate(tmp_path)
    log = tmp_path / "chunks.jsonl"
    log.write_text(log.read_text()[:-cut])
    assert 5 <= len(read_report(tmp_path)) <= 6
    assert main(["report", str(tmp_path)]) == 0


def test_page_is_self_contained_and_complete(tmp_path):
    generate(tmp_path, batch=2, extra=[Thumbnails(tmp_path)])
    html = write_page(tmp_path).read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", html), "nothing may be loaded from elsewhere"
    assert "http" not in re.sub(r"data:[^\"']*", "", html)
    assert html.count('class="chart"') == html.count('class="cache"') == 2
    assert "viewport" in html and '"torch"' in html.replace("&#34;", '"')
    assert len(list((tmp_path / "thumbs").glob("*.png"))) == 12
    assert html.count("<tr class=\"pruned\">") == 2


def test_page_draws_over_decoded_frames(tmp_path):
    generate(tmp_path)
    plain = write_page(tmp_path).read_text()
    frames = np.random.default_rng(0).random((72, 16, 24, 3)).astype(np.float32)
    assert len(write_page(tmp_path, frames).read_text()) != len(plain)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_small_runs_make_a_sensible_page(tmp_path, grid, chunks):
    generate(tmp_path, chunks=chunks, grid=grid, policy=tokentrim.DriftPolicy(fraction=1.0))
    assert "control chart" in write_page(tmp_path).read_text()


def test_empty_and_missing_runs_have_a_clear_message(tmp_path, capsys):
    with pytest.raises(ReportError, match="no chunk"):
        render(Report())
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "no chunks.jsonl" in capsys.readouterr().err
    (tmp_path / "chunks.jsonl").write_text("{}\nnonsense\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "not a chunk record" in capsys.readouterr().err


def test_cache_cells_by_hand():
    def record(chunk, **more):
        return ChunkRecord(0, chunk, 0, 3 * chunk, 3, {}, grid=(1, 2), **more)

    cells = cache_cells([record(0), record(1), record(2, pruned=True, tokens=(1,), dead=3), record(3)])
    assert cells.tolist() == [[1, 1, 1, 1], [1, 2, 1, 1]], "three dead rows of one token: the one chunk before"


def test_non_finite_numbers_become_null():
    line = ChunkRecord(0, 0, 0, 0, 3, {}, threshold=float("inf"), severity=float("nan")).as_json()
    assert '"threshold": null' in line and '"severity": null' in line


def test_progress_line_says_what_happened(tmp_path, capsys):
    generate(tmp_path, policy=tokentrim.DriftPolicy(), extra=[tokentrim.ProgressLine()])
    lines = capsys.readouterr().err.splitlines()
    assert "not judged" in lines[0] and "D=" in lines[1] and "no threshold" in lines[1] and "threshold=" in lines[2]
    generate(tmp_path, extra=[tokentrim.ProgressLine()])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert "not judged" in lines[0]
    assert "pruned 2/6 tokens" in lines[3]
