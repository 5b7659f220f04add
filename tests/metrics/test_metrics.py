"""Metrics against hand-computed cases, against public implementations, and on odd videos."""

import json

import numpy as np
import pytest
import skimage.color
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.metrics import metrics as m
from tokentrim_hooks.metrics.meter import measure
from tokentrim_hooks.metrics.trends import Contrast, start_end, windows


def flat(colour, frames=4, size=8):
    return np.broadcast_to(np.asarray(colour, np.float32), (frames, size, size, 3)).copy()


def noise(seed, frames=6, size=16):
    return np.random.default_rng(seed).random((frames, size, size, 3)).astype(np.float32)


def test_colours_by_hand():
    red = flat((1, 0, 0))
    assert m.luma(red) == pytest.approx([0.2126] * 4)
    assert m.saturation(red) == pytest.approx([1.0] * 4)
    assert m.saturation(flat((0.5, 0.25, 0.25))) == pytest.approx([0.5] * 4)
    assert m.saturation(flat((0, 0, 0))) == pytest.approx([0.0] * 4)
    assert m.contrast(red) == pytest.approx([0.0] * 4)
    half = flat((0, 0, 0))
    half[:, :4] = 1
    assert m.contrast(half) == pytest.approx([0.5] * 4)
    assert m.clipped(half) == pytest.approx([1.0] * 4)
    assert m.clipped(flat((0.5, 0.5, 0.5))) == pytest.approx([0.0] * 4)
    # Hasler and Suesstrunk: no spread, so 0.3 * |(rg, yb)| with rg = 255, yb = 127.5
    assert m.colourfulness(red) == pytest.approx([0.3 * np.hypot(255, 127.5)] * 4)


@given(st.integers(0, 10_000))
def test_lab_and_saturation_agree_with_scikit_image(seed):
    # OpenCV interpolates its conversion tables: within a tenth of a just noticeable difference (2.3).
    frames = noise(seed, frames=2, size=6)
    assert m.lab(frames) == pytest.approx(np.stack([skimage.color.rgb2lab(f).mean((0, 1)) for f in frames]), abs=0.23)
    assert m.saturation(frames) == pytest.approx([skimage.color.rgb2hsv(f)[..., 1].mean() for f in frames], abs=1e-5)


def test_flicker_is_vbench_formula():
    frames = flat((0, 0, 0), frames=2)
    frames[1] = 51 / 255
    assert m.flicker(frames) == pytest.approx((255 - 51) / 255)
    assert m.flicker(frames[:1]) == 1.0


def test_lag_similarity_sees_a_colour_change():
    frames = np.concatenate([flat((0.9, 0.1, 0.1), 3), flat((0.1, 0.1, 0.9), 3)])
    found = m.lag_similarity(frames, (1, 3, 9))
    assert found == {1: pytest.approx(4 / 5), 3: pytest.approx(0.0)}


def test_motion_follows_a_moving_square():
    def moving(step):
        frames = flat((0.1, 0.1, 0.1), frames=5, size=64)
        for t in range(5):
            frames[t, 20:40, 10 + step * t : 30 + step * t] = 0.9
        return frames

    still, slow, fast = (m.motion(moving(step)).mean() for step in (0, 1, 3))
    assert still == pytest.approx(0, abs=1e-3)
    assert still < slow < fast


@pytest.mark.parametrize(("height", "scale"), [(64, 1), (479, 1), (480, 2), (720, 3), (1080, 4)])
def test_motion_of_a_large_frame_is_measured_on_a_smaller_one_in_its_own_pixels(height, scale):
    """A texture that moves by (2, 3) pixels, as wide as it is high: flow on the whole says the same, within 3 %."""
    texture = np.random.default_rng(0).integers(0, 256, (height // 8 + 1,) * 2 + (3,), dtype=np.uint8)
    whole = texture.repeat(8, 0).repeat(8, 1)[:height, :height].astype(np.float32) / 255
    frames = np.stack([whole, np.roll(whole, (2, 3), (0, 1))])
    assert m.reduction((height, height)) == scale and m.grey(frames).shape[1:] == (height // scale,) * 2
    assert m.motion(frames) == pytest.approx([np.hypot(2, 3)], rel=0.1 if height == 64 else 0.03)


def test_boundary_spike_by_hand():
    steps = np.array([1, 1, 3, 1, 1, 3, 1, 1.0])
    assert m.boundary_spike(steps, 3) == pytest.approx(3.0)
    assert m.boundary_spike(np.ones(8), 3) == pytest.approx(1.0)
    assert np.isnan(m.boundary_spike(np.ones(1), 3)) and np.isnan(m.boundary_spike(np.ones(9), 0))
    # Self-Forcing: the first latent frame decodes to one frame, so its first chunk has fewer
    assert m.boundary_spike(np.array([1, 3, 1, 1, 3, 1.0]), 3, first=2) == pytest.approx(3.0)


def test_start_end_is_framepacks_share():
    series = np.arange(100, dtype=float)
    found = start_end(series)
    assert (found.start, found.end) == (pytest.approx(7.0), pytest.approx(92.0))
    assert found.signed == pytest.approx(85.0)
    assert start_end(series[::-1]).signed == pytest.approx(-85.0)
    assert start_end(series[::-1]).absolute == pytest.approx(85.0)
    assert start_end(series, frames=1) == Contrast(0.0, 99.0)


@given(st.integers(1, 30), st.integers(1, 12))
def test_windows_keep_the_mean_of_equal_parts(length, count):
    series = np.arange(length, dtype=float)
    found = windows(series, count)
    assert len(found) == min(length, count)
    assert found[0] >= series[0] and found[-1] <= series[-1]


def test_colour_shift_is_zero_for_a_steady_video_and_a_distance_else():
    frames = np.concatenate([flat((0.2, 0.2, 0.2), 10), flat((0.8, 0.8, 0.8), 10)])
    assert m.colour_shift(flat((0.3, 0.6, 0.1), 20)) == pytest.approx(0, abs=1e-4)
    light = m.lab(frames)[:, 0]
    assert m.colour_shift(frames) == pytest.approx(light[-1] - light[0], abs=1e-3)


@pytest.mark.parametrize("frames", [1, 2, 200])
@pytest.mark.parametrize("size", [1, 16])
def test_measure_takes_any_video(frames, size):
    found = measure(flat((0.5, 0.5, 0.5), frames, size), fps=16, period=12)
    values = {k: v for k, v in found.items() if isinstance(v, float) and k != "boundary_spike"}
    assert all(np.isfinite(value) for value in values.values())
    assert ("luma_drift_5s" in found) == (frames >= 160)
    assert found["saturation"] == 0
    json.dumps(found)


def test_consistency_never_stands_without_motion():
    assert {"lag_similarity", "motion"} <= measure(noise(0)).keys()


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (np.zeros((0, 4, 4, 3)), "no frame"),
        (np.zeros((2, 4, 4)), r"\[T, H, W, 3\]"),
        (np.full((1, 2, 2, 3), np.nan), "NaN"),
    ],
)
def test_what_is_no_video_is_refused(video, words):
    with pytest.raises(VideoError, match=words):
        measure(video)


def test_uint8_and_tensors_are_the_same_video():
    frames = (noise(3) * 255).astype(np.uint8)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    assert measure(frames)["luma"] == pytest.approx(measure(tensor)["luma"])
