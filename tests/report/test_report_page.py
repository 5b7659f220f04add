"""The log while a run goes on, what a crash leaves, and the page that is made of it."""

import base64
import json
import re
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.cli.main import main
from tokentrim_hooks.errors import ReportError, VideoError
from tokentrim_hooks.metrics.writing import write_video
from tokentrim_hooks.policy.controls import ChooseTokens
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.report.filmstrip import CUT, KEPT, unpatched_and_patched
from tokentrim_hooks.report.page import render, write_page
from tokentrim_hooks.report.page.charts import border, cache_cells, control_chart, severity_limits
from tokentrim_hooks.report.page.gathering import MAPS, Tally, gather
from tokentrim_hooks.report.page.words import chosen
from tokentrim_hooks.report.page.words import verdict as verdict_of
from tokentrim_hooks.report.record import ChunkRecord, Report, read_report
from tokentrim_hooks.report.thumbnails import Thumbnails
from tokentrim_hooks.testing import ForcedPolicy


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
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", html), "nothing may be loaded from elsewhere"
    assert "http" not in re.sub(r"data:[^\"']*", "", html)
    assert html.count('class="chart"') == html.count('class="cache"') == 2
    assert html.index('id="verdict"') < html.index("<nav") < html.index('class="chart"'), "the verdict comes first"
    assert "viewport" in html and '"torch"' in html.replace("&#34;", '"')
    assert len(list((tmp_path / "thumbs").glob("*.png"))) == 12
    assert html.count('<tr class="pruned">') == 2


def test_a_page_of_many_samples_opens_on_the_first_and_lists_them_all(tmp_path):
    generate(tmp_path, batch=3)
    html = write_page(tmp_path).read_text()
    assert re.findall(r'<li><a href="#([^"]+)">', html) == ["v0-s0", "v0-s1", "v0-s2", "figures", "settings"]
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(set(ids)) == len(ids) and {"v0-s0", "v0-s1", "v0-s2", "figures", "settings", "verdict"} <= set(ids)
    folded = re.findall(r'<details class="run">.*?<p class="verdict" id="([^"]+)"', html, re.DOTALL)
    assert folded == ["v0-s1", "v0-s2"] and "1 of 5 judged chunks regenerated: 3" in html.split("</nav>")[0]


def test_it_opens_on_the_first_sample_in_which_something_was_pruned(tmp_path):
    generate(tmp_path, batch=3)
    log = tmp_path / "chunks.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(r | {"pruned": r["pruned"] and r["sample"] == 2}) + "\n" for r in records))
    folded = re.findall(
        r'<details class="run">.*?<p class="verdict" id="([^"]+)"', write_page(tmp_path).read_text(), re.DOTALL
    )
    assert folded == ["v0-s0", "v0-s1"]


def test_a_page_of_one_sample_has_nothing_folded_but_its_table(tmp_path):
    generate(tmp_path)
    html = write_page(tmp_path).read_text()
    assert html.count("<details>") == 1 and '<details class="run">' not in html


def test_the_verdict_says_what_happened_and_what_it_does_not_prove(tmp_path):
    generate(tmp_path, batch=2)
    words = write_page(tmp_path).read_text().split('id="verdict">')[1].split("</p>")[0]
    assert words.startswith("2 of 10 judged chunks were regenerated without their drifting tokens, in 2 of 2 samples.")
    assert "no log can say" in words
    generate(tmp_path, policy=tokentrim.ObservePolicy())
    html = write_page(tmp_path).read_text()
    assert "Nothing was pruned: none of 5 judged chunks was regenerated. ObservePolicy only measures." in html
    assert 'class="cache"' not in html, "a cache map only where something was pruned"


def test_charts_of_all_samples_have_one_scale(tmp_path):
    generate(tmp_path, batch=2)
    runs = gather(enumerate(read_report(tmp_path))).runs
    records = [record for run in runs for record in run.records]
    limits = severity_limits(records)
    charts = [control_chart(run.records, limits=limits) for run in runs]
    assert charts[0].axes[0].get_ylim() == charts[1].axes[0].get_ylim() == limits
    values = [r.severity for r in records if r.severity is not None]
    assert limits[0] < min(values) and limits[1] > max(values)
    assert severity_limits([]) is None


def test_the_same_log_gives_the_same_page(tmp_path):
    generate(tmp_path)
    pages = {write_page(tmp_path).read_bytes() for _ in range(2)}
    assert len(pages) == 1
    for svg in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", pages.pop().decode()):
        drawn = base64.b64decode(svg).decode()
        used = set(re.findall(r"url\(#([^)]+)\)", drawn)) | set(re.findall(r'href="#([^"]+)"', drawn))
        defined = re.findall(r' id="([^"]+)"', drawn)
        assert used and used <= set(defined) and len(defined) == len(set(defined)), "renamed without losing one"


def test_an_act_of_another_policy_stands_in_the_figures(tmp_path):
    generate(tmp_path, policy=[ForcedPolicy(at={3: [1]}), tokentrim.CommitWindow(frames=3)])
    assert re.search(r"CommitWindow, hide</th><td>[\d,]+ rows in [\d,]+ calls", write_page(tmp_path).read_text())


def test_the_warm_up_is_shaded(tmp_path):
    """The option is read flat, wherever it stands in the policy: the log does not know of wrappers."""
    records = [ChunkRecord(0, i, 0, 3 * i, 3, {}, severity=1.0 + i, threshold=9.0, grid=(1, 2)) for i in range(6)]
    with_warm_up, without = (render(Report({"policy.warmup": n}, records)) for n in (3, 0))
    charts = [re.findall(r'control chart[^>]*src="data:image/svg\+xml;base64,([^"]+)', html)[0]
              for html in (with_warm_up, without)]  # fmt: skip
    shaded = [b"#eeeeee" in base64.b64decode(chart) for chart in charts]
    assert shaded == [True, False]


def test_a_wrapped_policys_warm_up_is_in_the_log(tmp_path):
    generate(tmp_path, policy=ChooseTokens(tokentrim.DriftPolicy(warmup=3), "least"))
    assert read_report(tmp_path).settings["policy.warmup"] == 3


def test_page_draws_over_decoded_frames(tmp_path):
    generate(tmp_path)
    plain = write_page(tmp_path).read_text()
    frames = np.random.default_rng(0).random((72, 16, 24, 3)).astype(np.float32)
    drawn = write_page(tmp_path, frames).read_text()
    assert "over the decoded frame" in drawn and "over the" not in plain and len(drawn) != len(plain)


def test_page_shows_the_unpatched_video_above_the_patched_one(tmp_path, capsys):
    generate(tmp_path)
    videos = np.random.default_rng(0).random((2, 72, 16, 24, 3)).astype(np.float32)
    for name, video in zip(("patched", "unpatched"), videos, strict=True):
        write_video(tmp_path / f"{name}.mp4", video)
    patched, unpatched = (str(tmp_path / f"{name}.mp4") for name in ("patched", "unpatched"))
    assert main(["report", str(tmp_path), "--video", patched, "--unpatched", unpatched]) == 0
    assert 'class="strip"' in (tmp_path / "report.html").read_text()
    strip = np.asarray(unpatched_and_patched(videos[1], videos[0], [KEPT, CUT, KEPT], columns=3))
    above = strip.reshape(-1, 3)
    for video in videos[::-1]:
        wanted = (255 * video[12, 0, 0]).round().astype(np.uint8)
        assert (above == wanted).all(axis=1).sum() >= 16, "the corner pixel of the middle of each first third, enlarged"
    assert main(["report", str(tmp_path), "--unpatched", unpatched]) == 2
    assert "needs --video" in capsys.readouterr().err
    with pytest.raises(VideoError, match="24x16, 72 frames against 24x16, 70 frames"):
        write_page(tmp_path, videos[0, :70], videos[1])


def test_settings_say_what_versions_were_used(tmp_path):
    settings = generate(tmp_path).settings
    assert settings["versions"]["tokentrim-hooks"] == tokentrim.__version__ and settings["versions"]["python"]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_small_runs_make_a_sensible_page(tmp_path, grid, chunks):
    generate(tmp_path, chunks=chunks, grid=grid, policy=tokentrim.DriftPolicy(fraction=1.0))
    html = write_page(tmp_path).read_text()
    assert ("No control chart: the first chunk has no predecessor" in html) == (chunks == 1)
    assert html.count("<img") == (0 if chunks == 1 else 2)


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
    spared = cache_cells([record(0), record(1), record(2, pruned=True, tokens=(1,), dead=3, anchors=3)])
    assert spared.tolist() == [[3, 1, 1], [3, 2, 1]], "the three anchor frames are the first chunk's"


def judged(chunk, severity, **more):
    return ChunkRecord(0, chunk, 0, 3 * chunk, 3, {}, severity=severity, threshold=2.0, grid=(1, 2), **more)


def verdict(records):
    tally = Tally()
    for record in records:
        tally.add(record)
    return verdict_of(tally)


def test_verdict_says_which_chunks_and_whether_it_helped():
    calm = [judged(1, 1.0), judged(2, 1.5)]
    assert verdict(calm) == "None of 2 judged chunks was regenerated."
    assert verdict([ChunkRecord(0, 0, 0, 0, 3, {})]) == "No chunk was judged."
    pruned = [judged(3, 3.0, pruned=True, accepted_severity=1.0), judged(5, 4.0, pruned=True, accepted_severity=2.5)]
    assert verdict(calm + pruned).startswith("2 of 4 judged chunks regenerated: 3, 5. 1 of these stayed above")
    assert verdict(calm + pruned[:1]).endswith("Made again, it was below the threshold.")


def test_maps_are_of_the_most_severe_chunks_in_order():
    def mapped(records):
        (run,) = gather(enumerate(records)).runs
        return run.places()

    calm = [judged(i, 1.0 + i / 10, drift=(1.0, 2.0)) for i in range(5)]
    assert mapped(calm) == [2, 3, 4]
    pruned = [judged(i, 50.0 - i, pruned=True, drift=(1.0, 2.0)) for i in range(5, 35)]
    assert mapped(calm + pruned) == list(range(5, 5 + MAPS))


def test_of_too_many_chunks_the_pruned_ones_are_shown_and_others_spread():
    records = [judged(i, 1.0, pruned=i % 100 == 7) for i in range(5000)]
    few = chosen(records, 200)
    assert len(few) <= 200 and sum(r.pruned for r in few) == 50
    gaps = [b.chunk - a.chunk for a, b in pairwise(few)]
    assert min(gaps) > 0 and max(gaps) < 60 and chosen(records[:30], 200) == records[:30]


def test_border_of_a_set_by_hand():
    row = border([0, 1], 3)
    assert len(row) == 6 and ((0.5, -0.5), (0.5, 0.5)) not in row, "no line between two tokens of the set"
    assert ((-0.5, -0.5), (-0.5, 0.5)) in row and ((0.5, -0.5), (1.5, -0.5)) in row


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
