"""Quality measures on videos whose score is known beforehand."""

import math

import pytest
import torch

from tokentrim_hooks.reference.quality import METRICS, sprites_alive, window
from tokentrim_hooks.reference.scenes import scenes

SCENE = scenes(1, 8, 12)
BY_NAME = {metric.name: metric for metric in METRICS}


def score(name, video):
    return BY_NAME[name].measure(video, SCENE)


def test_the_truth_is_perfect():
    perfect = {"sprites alive (identity)": 1.0, "motion / true motion": 1.0}
    for name, metric in BY_NAME.items():
        assert torch.equal(metric.measure(SCENE.video, SCENE), torch.full([8], perfect.get(name, 0.0))), name


def test_a_frozen_video_looks_stable_and_its_motion_tells():
    frozen = SCENE.video[:, :1].expand_as(SCENE.video)
    assert score("motion / true motion", frozen).tolist() == [0.0] * 8
    assert (score("motion error", frozen) > math.log(100)).all()
    assert score("colour histogram error", frozen).max() < 0.2


def test_without_sprites_none_is_alive():
    sprites = SCENE.masks.sum(2, keepdim=True) > 0
    plain = torch.where(sprites, SCENE.palette.mean(1)[:, None, :, None, None], SCENE.video)
    assert sprites_alive(plain, SCENE).tolist() == [0.0] * 8


def test_one_sprite_that_floods_the_frame_is_not_alive():
    flood = SCENE.colors[:, :1, :, None, None].expand_as(SCENE.video)
    assert sprites_alive(flood, SCENE).tolist() == [0.0] * 8


def test_shifted_brightness_has_its_squared_error_and_no_saturation_error():
    assert score("error to ground truth", SCENE.video + 0.5).tolist() == pytest.approx([0.25] * 8)
    assert score("saturation error", SCENE.video + 0.5).tolist() == pytest.approx([0.0] * 8, abs=1e-5)
    assert score("motion error", SCENE.video * 2).tolist() == pytest.approx([math.log(2)] * 8, abs=1e-5)


def test_no_colour_in_common():
    assert score("colour histogram error", torch.full_like(SCENE.video, 9.0)).min() > 0.99


def test_window_cuts_what_has_frames():
    part = window(SCENE, slice(3, 6))
    assert torch.equal(part.video, SCENE.video[:, 3:6]) and torch.equal(part.masks, SCENE.masks[:, 3:6])
    assert part.positions.shape == (8, 3, 2, 2) and part.colors.shape == (8, 2, 3)
