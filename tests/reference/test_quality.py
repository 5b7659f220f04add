"""Quality measures on videos whose score is known beforehand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from tokentrim_hooks.reference.injection import displacing, without_sprites
from tokentrim_hooks.reference.quality import METRICS, MORE, sprites_alive, window
from tokentrim_hooks.reference.scenes import scenes

SCENE = scenes(1, 8, 12)
BY_NAME = {metric.name: metric for metric in (*METRICS, *MORE)}


def score(name, video, scene=SCENE):
    return BY_NAME[name].measure(video, scene)


def plain(colour, scene=SCENE):
    """A video of one colour."""
    return torch.tensor(colour)[:, None, None].expand_as(scene.video)


def test_the_truth_is_perfect():
    perfect = {"sprites alive (identity)": 1.0, "motion / true motion": 1.0, "contrast / true contrast": 1.0}
    for name, metric in BY_NAME.items():
        if name != "flicker in the still part":
            assert torch.equal(metric.measure(SCENE.video, SCENE), torch.full([8], perfect.get(name, 0.0))), name
    # A pixel may change by STILL and be called still.
    assert score("flicker in the still part", SCENE.video).max() < 0.02


def test_a_frozen_video_looks_stable_and_its_motion_tells():
    frozen = SCENE.video[:, :1].expand_as(SCENE.video)
    assert score("motion / true motion", frozen).tolist() == [0.0] * 8
    assert score("motion error", frozen).tolist() == pytest.approx([math.log(100)] * 8)
    assert score("sprite speed error", frozen).tolist() == [1.0] * 8
    assert score("flicker in the still part", frozen).tolist() == [0.0] * 8
    assert score("colour histogram error", frozen).max() < 0.2


def test_without_sprites_none_is_alive_and_the_background_is_as_it_was():
    empty = without_sprites(SCENE)
    assert sprites_alive(empty, SCENE).tolist() == [0.0] * 8
    for name in ("background error", "saturation error", "contrast error", "hue error (degrees)"):
        assert score(name, empty).max() < 1e-5, name


def test_a_sprite_in_the_wrong_place_is_no_error_of_the_background():
    moved = displacing(SCENE, 0.5)
    outside = SCENE.masks.sum(2) == 0
    behind = ((moved - SCENE.video).square().mean(2) * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3))
    assert score("background error", moved).max() < 1e-3 < 0.02 < behind.min()


def test_one_sprite_that_floods_the_frame_is_not_alive_and_hides_nothing():
    flood = SCENE.colors[:, :1, :, None, None].expand_as(SCENE.video)
    assert sprites_alive(flood, SCENE).tolist() == [0.0] * 8
    assert score("background error", flood).min() > 0.3


def test_shifted_brightness_has_its_squared_error_and_no_saturation_error():
    brighter = SCENE.video + 0.5
    assert score("error to ground truth", brighter).tolist() == pytest.approx([0.25] * 8)
    assert score("error in the moving part", brighter).tolist() == pytest.approx([0.25] * 8)
    assert score("saturation error", brighter).tolist() == pytest.approx([0.0] * 8, abs=1e-5)
    assert score("motion error", SCENE.video * 2).tolist() == pytest.approx([math.log(2)] * 8, abs=1e-5)


def test_contrast_is_that_of_the_background_and_detail_does_not_depend_on_it():
    halved = SCENE.video * 0.5 + 0.2
    assert score("contrast / true contrast", halved).tolist() == pytest.approx([0.5] * 8)
    assert score("contrast error", halved).tolist() == pytest.approx([1.0] * 8)
    assert score("detail error", halved).tolist() == pytest.approx([0.0] * 8, abs=1e-4)
    assert score("contrast error", plain([0.1, 0.2, 0.3])).tolist() == pytest.approx([math.log2(100)] * 8)


def test_no_colour_in_common():
    assert score("colour histogram error", torch.full_like(SCENE.video, 9.0)).min() > 0.99
    red, green = plain([0.5, 0.0, 0.0]), replace(SCENE, video=plain([0.0, 0.5, 0.0]))
    assert score("hue histogram error", red, green).tolist() == [1.0] * 8
    assert score("hue error (degrees)", red, green).tolist() == pytest.approx([120.0] * 8)


def test_hues_go_the_short_way_round_the_circle():
    before, after = plain([0.5, 0.0, 0.05]), replace(SCENE, video=plain([0.5, 0.05, 0.0]))
    assert 8 <= score("hue error (degrees)", before, after).max() <= 12, "not 350"


def test_hue_error_is_the_cheapest_of_all_cuts_of_the_circle():
    rng = np.random.default_rng(3)
    one, other = (torch.tensor(rng.random((8, 12, 3, 32, 32)), dtype=torch.float32) ** 3 for _ in range(2))
    bare = replace(SCENE, video=other, masks=torch.zeros_like(SCENE.masks), colors=torch.full([8, 2, 3], 9.0))

    def cells(video):
        red, green, blue = np.moveaxis(video[0].double().numpy(), 1, 0)
        turn = np.degrees(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)) % 360
        weights = np.ptp([red, green, blue], axis=0)
        counts, _ = np.histogram(turn, bins=180, range=(0, 360), weights=weights)
        return counts / counts.sum()

    a, b = cells(one), cells(other)
    places = np.arange(180) * 2
    cuts = [wasserstein_distance(places, places, np.roll(a, cut), np.roll(b, cut)) for cut in range(180)]
    assert score("hue error (degrees)", one, bare)[0].item() == pytest.approx(min(cuts), rel=1e-3)


def test_flicker_is_seen_where_nothing_moves_and_only_there():
    sign = (-1.0) ** torch.arange(12)[:, None, None, None]
    still = SCENE.video.diff(dim=1).abs().mean(2) <= 0.02
    part = torch.cat([still[:, :1], still], dim=1) & torch.cat([still, still[:, -1:]], dim=1)
    everywhere = score("flicker in the still part", SCENE.video + 0.1 * sign)
    assert everywhere.tolist() == pytest.approx([0.2] * 8, abs=0.01)
    moving_only = score("flicker in the still part", SCENE.video + 0.1 * sign * ~part[:, :, None])
    assert (moving_only < 0.6 * everywhere).all()


def test_nothing_to_measure_is_no_number():
    still = replace(SCENE, video=SCENE.video[:, :1].expand_as(SCENE.video))
    restless = replace(SCENE, video=torch.randn(SCENE.video.shape, generator=torch.Generator().manual_seed(0)) * 9)
    assert score("error in the moving part", SCENE.video, still).isnan().all()
    assert score("sprite speed error", SCENE.video, still).isnan().all()
    assert score("flicker in the still part", SCENE.video, restless).isnan().all()


def test_window_cuts_what_has_frames():
    part = window(SCENE, slice(3, 6))
    assert torch.equal(part.video, SCENE.video[:, 3:6]) and torch.equal(part.masks, SCENE.masks[:, 3:6])
    assert part.positions.shape == (8, 3, 2, 2) and part.colors.shape == (8, 2, 3)
