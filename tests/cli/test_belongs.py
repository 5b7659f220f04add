"""``tokentrim report --video`` takes the run's own video, not just any."""

import json
import os
import time

import numpy as np
import pytest

from tokentrim_hooks.cli.main import main
from tokentrim_hooks.cli.script.folders import claimed, ended, times_of
from tokentrim_hooks.metrics.writing import write_video
from tokentrim_hooks.report.record import ChunkRecord, Report


def video(path, frames=12, size=(32, 48), age=0.0):
    write_video(path, np.full((frames, *size, 3), 0.5), 8)
    os.utime(path, (time.time() - age,) * 2)
    return str(path)


@pytest.fixture
def run(tmp_path):
    """The folder of a run of four chunks of two latent frames of 4 x 6 tokens."""
    folder = claimed(tmp_path / "run", "tokentrim run x.py")
    one = dict(video=0, sample=0, frames=2, phases={"denoise": 4}, grid=(4, 6), drift=(0.1,) * 24)
    records = [ChunkRecord(chunk=n, start=2 * n, severity=1.0 if n else None, **one) for n in range(4)]
    Report({"adapter": "x"}, records).save(folder)
    ended(folder)
    return folder


@pytest.mark.parametrize("card", ["{", "[]", 100_000 * "[", '{"began": "yesterday", "ended": []}'])
def test_a_card_that_is_none_says_nothing(run, card):
    (run / "run.json").write_text(card)
    assert times_of(run) == (None, None)


def test_the_run_s_own_video_is_taken(run, tmp_path, capsys):
    assert main(["report", str(run), "--video", video(tmp_path / "own.mp4")]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"age": 3600}, "it was written before the run began"),
        ({"frames": 7}, "it has 7 frames, fewer than the 8 latent frames of the run"),
        ({"size": (48, 32)}, "it is 32 x 48, while the run's tokens are 6 x 4"),
    ],
)
def test_another_run_s_video_is_refused(run, tmp_path, wrong, words, capsys):
    other = video(tmp_path / "other.mp4", **wrong)
    assert main(["report", str(run), "--video", other]) == 2
    said = capsys.readouterr().err
    assert words in said and "add --unchecked" in said and len(said.splitlines()) == 2
    assert not (run / "report.html").exists()
    assert main(["report", str(run), "--video", other, "--unchecked"]) == 0


def test_a_later_video_is_asked_about(run, tmp_path, capsys):
    later = video(tmp_path / "later.mp4", age=-7300)
    assert main(["report", str(run), "--video", later]) == 0
    assert "was written 2 hours after the run had ended: is it this run's?" in capsys.readouterr().err


def test_no_video_and_no_run_are_told(run, tmp_path, capsys):
    assert main(["report", str(run), "--video", str(tmp_path / "none.mp4")]) == 2
    assert "no such video" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--video", video(tmp_path / "own.mp4")]) == 2
    assert "no chunks.jsonl in" in capsys.readouterr().err


def test_a_run_s_card_says_when(run):
    began, done = times_of(run)
    assert time.time() - 60 < began <= done <= time.time()
    assert json.loads((run / "run.json").read_text())["command"] == "tokentrim run x.py"
    (run / "run.json").write_text("[broken")
    assert times_of(run) == (None, None)
