"""A video of any length is measured one frame at a time, and gives what the whole of it gives."""

import json
import subprocess
import sys
import tracemalloc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.metrics import metrics as m
from tokentrim_hooks.metrics.frames import as_frames
from tokentrim_hooks.metrics.meter import Meter, metered
from tokentrim_hooks.metrics.trends import WINDOWS, drift
from tokentrim_hooks.metrics.writing import write_video


def synthetic(length, size=(16, 24), seed=0, alive=None):
    """Frames that nobody holds; ``alive`` counts those that are in memory, and how many there were at most."""
    random = np.random.default_rng(seed)
    for number in range(length):
        frame = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        frame //= 1 + number % 3
        if alive is not None:
            alive[0] += 1
            alive[1] = max(alive)
            weakref.finalize(frame, lambda: alive.__setitem__(0, alive[0] - 1))
        yield frame
        del frame


@given(st.integers(1, 70), st.integers(0, 10_000), st.sampled_from([None, 1, 3, 12]))
@settings(deadline=None, max_examples=25)
def test_one_by_one_gives_what_the_whole_gives(length, seed, period):
    found = metered(synthetic(length, seed=seed), 4.0, period).values()
    video = as_frames(np.stack(list(synthetic(length, seed=seed))))
    for name, series in m.SERIES.items():
        assert found[name] == pytest.approx(float(series(video).mean()), rel=1e-9)
    assert found["colour_shift"] == pytest.approx(m.colour_shift(video), abs=1e-6)
    assert found["flicker"] == pytest.approx(m.flicker(video), rel=1e-9)
    assert found["lag_similarity"] == pytest.approx(m.lag_similarity(video), rel=1e-9)
    steps = m.motion(video)
    assert found["motion"] == pytest.approx(steps.mean() if len(steps) else 0.0, rel=1e-9)
    if period is not None:
        assert found["boundary_spike"] == pytest.approx(m.boundary_spike(steps, period), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("length", [20, 200])
def test_frames_alive_do_not_grow_with_the_video(length):
    alive = [0, 0]
    metered(synthetic(length, alive=alive), 16.0)
    assert alive[1] <= 2, "the one that is measured, and the one that the generator makes"


def test_memory_does_not_grow_by_more_than_numbers():
    def peak(length):
        tracemalloc.start()
        metered(synthetic(length, (64, 64)), 16.0)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(5)
    short, long = peak(80), peak(480)
    assert long - short < 400 * 400, "400 more frames of 12,288 bytes, or 98,304 as floats: not one of them is kept"


def test_a_frame_of_a_real_video_takes_tens_of_megabytes():
    def peak(length):
        tracemalloc.start()
        metered(synthetic(length, (480, 832)), 16.0)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    short, long = peak(2), peak(5)
    assert long < 64e6 and long - short < 1e6, "of a gigabyte the rest is Python, torch and OpenCV"


MEASURED = """
import resource, sys
from tokentrim_hooks.cli.main import main
assert main(["metrics", sys.argv[1], "--json", sys.argv[2]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the unit of ru_maxrss is another")
def test_the_command_s_memory_is_that_of_a_short_video(tmp_path):
    """With the file's reader and decoder, of which tracemalloc sees nothing: 2,000 frames are 37 MB, as floats 295."""

    def peak(length):
        path = write_video(tmp_path / f"{length}.mp4", synthetic(length, (64, 96)), 16.0)
        command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "out.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "out.json").read_text())[str(path)]["frames"] == length
        return 1024 * int(done.stdout.split()[-1])

    short, long = peak(100), peak(2_000)
    assert long - short < 12e6


def test_numbers_per_frame_are_few():
    meter = metered(synthetic(60), 16.0)
    assert sum(series.itemsize * len(series) for series in meter.series.values()) <= 88 * 60
    assert len(meter._histograms) == max(m.LAGS)


def test_drift_per_minute_of_a_ramp_by_hand():
    found = drift(np.arange(160) / 16, 16.0)
    assert found.per_minute == pytest.approx(60), "one unit per second"
    assert len(found.windows) == WINDOWS and found.seconds == pytest.approx(10 / WINDOWS)
    assert found.windows[0] == pytest.approx(np.arange(20).mean() / 16)
    assert drift(np.ones(90), 16.0).per_minute == pytest.approx(0, abs=1e-9)
    assert len(drift(np.ones(50), 16.0).windows) == 3, "a window is a second long"
    short = drift(np.arange(31.0), 16.0)
    assert np.isnan(short.per_minute) and len(short.windows) == 1


@given(st.integers(0, 10_000), st.floats(-5, 5), st.floats(0.1, 3))
@settings(deadline=None)
def test_drift_follows_scale_and_ignores_offset(seed, offset, scale):
    series = np.random.default_rng(seed).random(96)  # eight equal windows
    plain, moved = drift(series, 10.0).per_minute, drift(offset + scale * series, 10.0).per_minute
    assert moved == pytest.approx(scale * plain, abs=1e-6)
    assert drift(series[::-1], 10.0).per_minute == pytest.approx(-plain, abs=1e-6)


def test_what_is_no_video_is_refused_on_the_way():
    with pytest.raises(VideoError, match="no frame"):
        metered([])
    with pytest.raises(VideoError, match=r"changes its size: 24x16 and 16x16"):
        metered([np.zeros((16, 24, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)])
    with pytest.raises(VideoError, match=r"\[H, W, 3\]"):
        metered([np.zeros((16, 24), np.uint8)])
    with pytest.raises(VideoError, match="above 0"):
        Meter(0.0)
