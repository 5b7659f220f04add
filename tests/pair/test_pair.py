"""One script with and without the patch: which videos are found, what is said of a pair and what is not, the page."""

import os
import re
from dataclasses import replace

import av
import numpy as np
import pytest

from tokentrim_hooks.cli.script.arms import Arm, videos_of_all, without_torchrun
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.pair.charts import _apart, curve
from tokentrim_hooks.experiments.pair.curves import UNITS, Curves, apart
from tokentrim_hooks.experiments.pair.page import playable, spans_of, write_page
from tokentrim_hooks.experiments.pair.several import table
from tokentrim_hooks.experiments.pair.videos import Places, kept, written
from tokentrim_hooks.experiments.pair.words import ONE_PAIR, Pair, headline, sentences
from tokentrim_hooks.metrics.writing import write_video
from tokentrim_hooks.report.record import ChunkRecord, Report


def report(pruned=(3,), chunks=6, warm=2):
    """A log of chunks of two latent frames."""
    records = [
        ChunkRecord(video=0, chunk=n, sample=0, start=2 * n, frames=2, phases={"denoise": 4},
                    severity=1.0 if n else None, threshold=2.0 if n > warm else None,
                    pruned=n in pruned, extra_calls=int(n in pruned))
        for n in range(chunks)
    ]  # fmt: skip
    return Report({"adapter": "x"}, records)


BEFORE = {"colour drift": 8.0, "sharpness drift": 40.0, "flicker": 2.0, "motion": 1.0}
LESS = {"colour drift": 4.0, "sharpness drift": 20.0, "flicker": 2.0, "motion": 1.0}
PAIR = Pair(report(), BEFORE, LESS, apart=3.0, again=0.0, repeated=True, seconds=(10.0, 11.0))
OTHER = Report({"adapter": "x"}, [replace(record, sample=1) for record in report().records])

CASES = {
    "less": (PAIR, "Less drift with pruning, in this one pair."),
    "more": (replace(PAIR, unpatched=LESS, patched=BEFORE), "More drift with pruning, in this one pair."),
    "mixed": (
        replace(PAIR, patched={**LESS, "sharpness drift": 60.0}),
        "Less drift in one measure, more in another, with pruning, in this one pair.",
    ),
    "same": (replace(PAIR, patched={**BEFORE, "colour drift": 8.1}), "About as much drift with pruning as without"),
    "nothing": (replace(PAIR, report=report(pruned=()), patched=BEFORE, apart=0.0), "Nothing was pruned."),
    "other video": (replace(PAIR, report=OTHER, apart=0.0, patched=BEFORE), "Chunks were pruned, but not of this"),
    "not shown": (replace(PAIR, apart=0.0, patched=BEFORE), "Chunks were pruned, but its frames show nothing"),
    "noise": (replace(PAIR, again=2.9), "Cannot be told: the script gives another video at each run."),
    "beyond noise": (replace(PAIR, again=0.5), "Less drift with pruning, in this one pair."),
    "lengths": (replace(PAIR, again=None), "Cannot be told"),
    "once": (replace(PAIR, again=None, repeated=False), "Less drift with pruning, in this one pair."),
}


@pytest.mark.parametrize("case", CASES)
def test_the_headline_is_what_happened(case):
    pair, words = CASES[case]
    assert headline(pair).startswith(words)
    assert sentences(pair)[-1] == ONE_PAIR


@pytest.mark.parametrize("case", CASES)
def test_no_pair_is_said_to_prove_anything(case):
    text = " ".join([headline(CASES[case][0]), *sentences(CASES[case][0])])
    assert not re.search(r"\b(better|works|improv\w*|significant\w*|always|proves?|effective)\b", text)


def test_the_sentences_say_what_is_known_of_the_script():
    said = {case: " ".join(sentences(pair)) for case, (pair, _) in CASES.items()}
    assert "1 of 5 judged chunks was pruned and made again: 3." in said["less"]
    assert "moves by 4.0 with the patch and by 8.0 without" in said["less"]
    assert "5 chunks were judged, 2 of them while the statistics were warming up" in said["nothing"]
    assert "are the same, bit for bit: what differs is the patch's doing" in said["less"]
    assert "differ by 2.90 of 255 levels, patched and unpatched by 3.00" in said["noise"]
    assert "differ in length" in said["lengths"] and "(--once)" in said["once"]
    assert "11 s with the patch, 10 s without" in said["less"] and "denoiser calls 24 + 1 extra" in said["less"]
    still = replace(PAIR, patched={**LESS, "motion": 0.5})
    assert "The patched video moves less: that alone looks like less drift." in sentences(still)
    assert "; none of the others drifted above its threshold, so nothing was changed." in said["nothing"]
    watched = replace(PAIR, report=Report({"policy.warmup": 2}, [replace(r, severity=3.0) for r in report(pruned=())]))
    assert "6 chunks were judged, 4 of them while the statistics were" in sentences(watched)[0]
    assert "; 2 of the others drifted above their threshold, and the policy left it at that." in sentences(watched)[0]
    unjudged = replace(PAIR, report=report(pruned=(), chunks=1))
    assert sentences(unjudged)[0].startswith("No chunk was judged: the run made 1")


def test_a_verdict_needs_six_pairs():
    few = {seed: PAIR for seed in range(5)}
    assert "too few" in table(few) and "better" not in table(few).partition("Cells:")[0]
    many = {s: replace(PAIR, patched={**LESS, "colour drift": 4.0 + s / 100}) for s in range(8)}
    assert "better" in table(many).partition("Cells:")[0]


def frames(count=24, size=(32, 48), shift=0.0):
    ramp = np.linspace(0.2, 0.6, size[1])
    rows = [np.roll(ramp, n) + shift * n / count for n in range(count)]
    return [np.repeat(np.tile(row, (size[0], 1))[..., None], 3, -1) for row in rows]


def test_curves_are_those_of_the_metrics_command(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames(shift=0.3), 8)
    found = Curves.of(path)
    assert (found.frames, found.seconds) == (24, 3.0) and found.series.keys() == UNITS.keys()
    assert [len(found.series[name]) for name in UNITS] == [24, 24, 23, 23]
    assert found.series["colour"][0] < 3 < found.series["colour"][-1] and found.values()["colour drift"] > 10


def test_a_step_stands_at_the_frame_that_it_leads_to(tmp_path):
    """Else a pruned chunk seems to change what was before it."""
    still = [np.full((32, 48, 3), 0.5)] * 12
    one, other = (write_video(tmp_path / f"{n}.mp4", still[:6] + [f + n * 0.2 for f in still[6:]], 4) for n in (0, 1))
    for name in UNITS:
        upper, lower = curve(name, Curves.of(one), Curves.of(other), [(1.5, 2.0)]).axes
        seconds, values = lower.lines[0].get_data()
        changed = seconds[np.abs(values) > 0.5]
        assert name in ("motion", "sharpness") or changed[0] == 1.5, name
        assert seconds[-1] == 11 / 4 and len(seconds) == len(upper.lines[0].get_xdata())


def test_rounding_is_no_difference_that_is_drawn():
    one = np.array([0.4, 0.5, 0.6])
    assert (_apart(one + 5e-15, one) == 0).all() and not len(_apart(one[:0], one[:0]))
    assert _apart(one + np.array([0, 1e-4, 0]), one) == pytest.approx([0, 1e-4, 0])


def test_a_copy_for_the_page_is_as_old_as_the_video(tmp_path):
    """So that ``tokentrim report --video`` takes it for what it is."""
    source = write_video(tmp_path / "a.mp4", frames(), 8)
    other = tmp_path / "a.avi"
    with av.open(str(other), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for image in frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray((255 * image).astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    os.utime(other, (1_000_000_000, 1_000_000_000))
    assert playable(source, tmp_path / "unused.mp4") == source
    copy = playable(other, tmp_path / "copy.mp4")
    assert copy.name == "copy.mp4" and copy.stat().st_mtime == 1_000_000_000


def test_how_far_videos_are_apart(tmp_path):
    one = write_video(tmp_path / "1.mp4", frames(), 8)
    assert apart(one, write_video(tmp_path / "2.mp4", frames(), 8)) == 0
    assert 20 < apart(one, write_video(tmp_path / "3.mp4", [f + 0.1 for f in frames()], 8)) < 31
    assert apart(one, write_video(tmp_path / "4.mp4", frames(23), 8)) is None
    assert apart(one, write_video(tmp_path / "5.mp4", frames(size=(48, 32)), 8)) is None


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "project" / "out").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_what_a_script_wrote_is_found_and_kept(project, tmp_path):
    (project / "old.mp4").write_text("old")
    (project / "out" / "again.mp4").write_text("first")
    (project / "runs").mkdir()
    places = Places.of(["--out", "out", f"--to={tmp_path}/elsewhere/x.gif"], "", project / "runs")
    before = places.stamps()
    (project / "out" / "again.mp4").write_text("second")
    (tmp_path / "elsewhere" / "x.gif").write_text("x")
    (project / "runs" / "ours.mp4").write_text("ours")
    (project / "out" / "note.txt").write_text("no video")
    os.utime(tmp_path / "elsewhere" / "x.gif", (2e9, 2e9))
    found = written(before, places.stamps())
    assert [path.name for path in found] == ["again.mp4", "x.gif"], "in the order in which they were finished"
    where = kept(found, before, project / "runs" / "patched")
    assert [path.read_text() for path in where] == ["second", "x"]
    assert (project / "out" / "again.mp4").exists(), "it was there before"
    assert not (tmp_path / "elsewhere" / "x.gif").exists(), "so that the next run begins as this one did"


@pytest.mark.parametrize("absolute", [False, True])
def test_a_pattern_says_where_to_look(project, tmp_path, absolute):
    inside = f"{tmp_path}/elsewhere/*.bin" if absolute else "../elsewhere/*.bin"
    places = Places.of([], inside, project / "runs")
    before = places.stamps()
    (tmp_path / "elsewhere" / "video.bin").write_text("x")
    (project / "out" / "other.mp4").write_text("x")
    assert [path.name for path in written(before, places.stamps())] == ["video.bin"]


def test_runs_are_paired_by_name_where_names_are_shared(tmp_path):
    arms = [Arm([tmp_path / n for n in names], 1.0) for names in (("a1.mp4", "b.mp4"), ("a2.mp4", "b.mp4"))]
    assert [path.name for path in videos_of_all(arms)] == ["b.mp4", "b.mp4"]
    stamped = [Arm([tmp_path / name], 1.0) for name in ("160501.mp4", "160733.mp4")]
    assert [path.name for path in videos_of_all(stamped)] == ["160501.mp4", "160733.mp4"]


def test_torchrun_is_started_anew():
    torchrun = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "1",
                "TORCHELASTIC_RUN_ID": "none", "ROLE_RANK": "0"}  # fmt: skip
    given = {**torchrun, "PATH": "x", "OMP_NUM_THREADS": "1"}
    launcher, environment = without_torchrun(given)
    assert launcher[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    assert environment == {"PATH": "x", "OMP_NUM_THREADS": "1"}
    assert without_torchrun({"PATH": "x"}) == ([], {"PATH": "x"})
    with pytest.raises(TokenTrimError, match="on one machine only"):
        without_torchrun({**given, "LOCAL_WORLD_SIZE": "2"})


def test_pruned_chunks_are_marked_where_they_are_in_the_video(tmp_path):
    curves = Curves.of(write_video(tmp_path / "a.mp4", frames(24), 8))
    assert spans_of(report(pruned=(1, 5)), curves) == [(0.5, 1.0), (2.5, 3.0)]


def test_a_page_plays_what_a_browser_plays(tmp_path):
    path = tmp_path / "old.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in frames():
            picture = av.VideoFrame.from_ndarray((255 * frame).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    copy = playable(path, tmp_path / "copy.mp4")
    assert copy == tmp_path / "copy.mp4" and Curves.of(copy).frames == 24
    assert playable(copy, tmp_path / "none.mp4") == copy


def test_a_page_has_all_and_takes_hostile_names(tmp_path):
    name = 'a"><script>alert(1)</script> %23.mp4'.replace("/", "")
    videos = [write_video(tmp_path / f"{n}{name}", frames(shift=n / 10), 8) for n in (1, 2)]
    curves = [Curves.of(path) for path in videos]
    more = {"command": "tokentrim try <x>", "again": "tokentrim try --pairs 8", "report": "", "others": 2, "pairs": ""}
    page = write_page(tmp_path, PAIR, videos, curves, more).read_text()
    assert "<h1>Less drift with pruning, in this one pair.</h1>" in page and ONE_PAIR in page
    assert page.count("<video ") == 2 and page.count("<script>") == 1 and "<span>&lt;x&gt;</span>" in page
    assert page.count("data:image/svg+xml") == 8 and page.count(' alt="') == 4
    assert '<i style="left: 50.000%; width: 16.667%"></i>' in page and "pruned chunks (3)" in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import""", page), "it loads nothing from elsewhere"
