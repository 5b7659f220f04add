"""What a reader of the table of measures is told."""

import io

import numpy as np
import pytest

from tokentrim_hooks.console import counted
from tokentrim_hooks.metrics.meter import metered
from tokentrim_hooks.metrics.rows import BRACKETS, ONE_PAIR, SHORT, SHOWN, Measured, direction, notes, table


def video(fade, frames=64, seed=0):
    """Noise that fades to grey by so much."""
    pixels = np.random.default_rng(seed).random((24, 24, 3)).astype(np.float32)
    return [0.5 + (pixels - 0.5) * (1 - fade * number / frames) for number in range(frames)]


@pytest.fixture(scope="module")
def measured():
    return {name: Measured.by(metered(video(fade), 16.0, 12)) for name, fade in (("a", 0.1), ("b", 0.8))}


def test_a_short_table_has_twelve_rows_with_their_direction(measured):
    heads, rows = table({"a": measured["a"]})
    assert heads == ["measure", "better", "a"]
    assert len(rows) == len(SHOWN) == 12 and {row[1] for row in rows} == {"up", "down", "near 0", "near 1", "-"}


def test_the_whole_table_has_every_measure_once(measured):
    rows = table({"a": measured["a"]}, whole=True)[1]
    assert len(rows) == len(measured["a"].values) == len({row[0] for row in rows})


def test_two_videos_have_a_column_of_differences_and_three_have_none(measured):
    heads, rows = table(measured)
    assert heads[-1] == "difference"
    lines = {row[0]: row for row in rows}
    assert lines["contrast per minute"][-1].startswith("-") and lines["contrast per minute"][-1].endswith(" worse")
    assert lines["colour shift, start to end"][1] == "down"
    assert lines["motion, pixels per frame"][-1][-1].isdigit(), "no way of it is better"
    assert table({**measured, "c": measured["a"]})[0] == ["measure", "better", "a", "b", "c"]


def test_a_video_does_not_differ_from_itself(measured):
    rows = table({"a": measured["a"], "again": measured["a"]}, whole=True)[1]
    assert {row[-1] for row in rows} == {"+0"}


def test_drift_stands_with_the_windows_that_made_it(measured):
    drift = measured["b"].drifts["contrast"]
    cell = measured["b"].cell("contrast_per_minute")
    assert cell == f"{drift.per_minute:.4g} ({' '.join(f'{mean:.3g}' for mean in drift.windows)})"
    assert drift.per_minute < 0 and len(drift.windows) == 4, "four seconds"
    assert measured["b"].as_json()["windows"]["contrast"] == list(drift.windows)


@pytest.mark.parametrize(
    ("key", "better"),
    [("luma", "-"), ("luma_drift", "near 0"), ("luma_drift_abs", "down"), ("sharpness_drift_5s", "near 0"),
     ("similarity at lag 50", "up"), ("colourfulness_per_minute", "near 0"), ("frames", "-")],
)  # fmt: skip
def test_direction_of_any_measure(key, better):
    assert direction(key) == better


def test_a_measure_that_a_video_lacks_is_a_dash():
    short = Measured.by(metered(video(0.1, frames=1), 16.0))
    rows = {row[0]: row[2:] for row in table({"a": short, "b": short})[1]}
    assert "luma per minute" not in rows and rows["steadiness (VBench flicker)"] == ["1", "1", "+0"]
    assert short.cell("motion_per_minute") == "-"


def test_the_notes_are_of_what_stands_there(measured):
    assert BRACKETS in notes(measured) and ONE_PAIR in notes(measured) and SHORT not in notes(measured)
    short = {"a": Measured.by(metered(video(0.1, frames=27), 16.0))}
    assert SHORT in notes(short) and BRACKETS not in notes(short) and ONE_PAIR not in notes(short)
    assert all(len(line) <= 120 for line in notes(measured).splitlines())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_says_how_far_and_leaves_the_line_clean(monkeypatch):
    clock = iter(np.arange(0, 1000, 0.2))
    monkeypatch.setattr("tokentrim_hooks.console.time.monotonic", lambda: next(clock))
    out = Terminal()
    assert list(counted(range(20), "a.mp4: frame", 20, out)) == list(range(20))
    lines = out.getvalue().split("\r")
    assert "a.mp4: frame 2 of 20, 0:04 left" in [line.strip() for line in lines]
    assert not lines[-1].strip(), "the last line is wiped"
    assert "\n" not in out.getvalue()


def test_progress_in_a_file_is_a_line_every_half_minute(monkeypatch):
    clock = iter(np.arange(0, 10_000, 10.0))
    monkeypatch.setattr("tokentrim_hooks.console.time.monotonic", lambda: next(clock))
    out = io.StringIO()
    list(counted(range(9), "a.mp4: frame", 0, out))
    assert out.getvalue().splitlines() == ["a.mp4: frame 3", "a.mp4: frame 6", "a.mp4: frame 9"]
