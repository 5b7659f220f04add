"""Measures of sprites, on rectangles whose area, elongation and way can be counted, and against scikit-image."""

import math

import numpy as np
import pytest
import torch
from skimage.measure import regionprops

from tokentrim_hooks.reference.quality_sprites import (
    _elongation,
    area_error,
    living,
    look,
    place_error,
    shape_error,
    speed_error,
    sprites_alive,
)
from tokentrim_hooks.reference.scenes import Scene, scenes

RED, BLUE = (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0)
MEASURES = {sprites_alive: 0.0, area_error: 2.0, shape_error: 2.0, place_error: 16.0, speed_error: 1.0}
"""With the worst value of each: that of an absent sprite."""


def boxes(*each):
    """Masks [1, F, 1, 32, 32] of one box (top, left, height, width) for each frame; None is an empty frame."""
    masks = torch.zeros(1, len(each), 1, 32, 32)
    for frame, box in enumerate(each):
        if box:
            top, left, height, width = box
            masks[0, frame, 0, top : top + height, left : left + width] = 1
    return masks


def painted(red, blue):
    return red * torch.tensor(RED)[:, None, None] + blue * torch.tensor(BLUE)[:, None, None]


def scene_of(red, blue):
    colors = torch.tensor([[RED, BLUE]])
    masks = torch.cat([red, blue], dim=2)
    nothing = torch.zeros(1, red.shape[1], 2, 2)
    return Scene(painted(red, blue), nothing, colors, masks, torch.zeros(1, 2, 3), torch.zeros(1, 2))


WALK = boxes((4, 4, 8, 8), (4, 6, 8, 8), (4, 8, 8, 8))
STAND = boxes(*[(20, 20, 8, 8)] * 3)
SCENE = scene_of(WALK, STAND)


def values(red, blue=STAND):
    video = painted(red, blue)
    return {measure: measure(video, SCENE).item() for measure in MEASURES}


def test_the_truth_has_no_error():
    found = values(WALK)
    assert found == {sprites_alive: 1, area_error: 0, shape_error: 0, place_error: 0, speed_error: 0}


def test_shifted_by_three_and_four_pixels_is_five_off_and_nothing_else():
    found = values(boxes((7, 8, 8, 8), (7, 10, 8, 8), (7, 12, 8, 8)))
    assert found[place_error] == pytest.approx(5 / 2), "the other sprite is in its place"
    assert [found[m] for m in (sprites_alive, area_error, shape_error, speed_error)] == [1, 0, 0, 0]


def test_half_the_area_is_one_and_four_times_as_long_as_wide_is_two():
    half = values(boxes((4, 4, 8, 4), (4, 6, 8, 4), (4, 8, 8, 4)))
    assert half[area_error] == pytest.approx(1 / 2) and half[shape_error] == pytest.approx(1 / 2)
    assert half[sprites_alive] == 1 and half[place_error] == pytest.approx(2 / 2) and half[speed_error] == 0
    long = values(boxes((6, 0, 4, 16), (6, 2, 4, 16), (6, 4, 4, 16)))
    assert (long[area_error], long[shape_error], long[place_error]) == pytest.approx((0, 1, 0), abs=1e-5)


def test_speed_counts_the_way_and_not_the_place():
    assert values(boxes(*[(4, 6, 8, 8)] * 3))[speed_error] == 1
    assert values(boxes((4, 14, 8, 8), (4, 13, 8, 8), (4, 12, 8, 8)))[speed_error] == 0.5
    assert values(boxes((4, 0, 8, 8), (4, 8, 8, 8), (4, 16, 8, 8)))[speed_error] == 3


def test_an_absent_sprite_is_the_worst_there_is():
    nothing = torch.zeros_like(WALK)
    assert values(nothing, nothing) == MEASURES
    crumbs = boxes(*[(4, 4, 3, 5)] * 3)  # 15 of 64 pixels
    assert values(crumbs, crumbs) == MEASURES
    one = values(WALK, nothing)
    assert [one[m] for m in (sprites_alive, area_error, shape_error, place_error)] == [0.5, 1, 1, 8]
    once = values(boxes((4, 4, 8, 8), None, (4, 8, 8, 8)))
    assert once[sprites_alive] == pytest.approx(5 / 6) and once[speed_error] == 1, "gone for a moment: two steps lost"


def test_a_video_of_nan_has_no_sprites():
    video = torch.full_like(SCENE.video, math.nan)
    assert {measure: measure(video, SCENE).item() for measure in MEASURES} == MEASURES


def test_a_hidden_sprite_does_not_count():
    hidden = boxes((4, 4, 8, 8), (4, 4, 1, 11), None)
    scene = scene_of(hidden, STAND)
    video = painted(boxes((4, 4, 8, 8), None, None), STAND)
    assert look(video, scene).counts[0, :, 0].tolist() == [True, False, False]
    for measure in (area_error, shape_error, place_error):
        assert measure(video, scene).item() == 0
    assert sprites_alive(video, scene).item() == 1
    nobody = scene_of(torch.zeros_like(STAND), torch.zeros_like(STAND))
    assert all(measure(video, nobody).isnan().all() for measure in MEASURES)


def test_burnt_colours_are_clipped_and_faded_ones_are_lost_at_half():
    for gain, alive in ((3.0, 1.0), (0.55, 1.0), (0.45, 0.0)):
        assert sprites_alive(SCENE.video * gain, SCENE).item() == alive


def test_the_margin_of_the_living_is_one_pixel_and_a_flood_has_none():
    where = living(SCENE.video, SCENE)[0, 0]
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[3:13, 3:13] = expected[19:29, 19:29] = True
    assert torch.equal(where, expected)
    flood = painted(torch.ones_like(WALK), torch.zeros_like(STAND))
    assert not living(flood, SCENE).any()


def test_elongation_is_scikit_images():
    scene = scenes(4, 6, 5)
    masks = scene.masks > 0.5
    ours = _elongation(masks)
    for index in np.ndindex(6, 5, 2):
        pixels = masks[index].numpy().astype(int)
        if pixels.sum() < 12:
            continue
        region = regionprops(pixels)[0]
        # scikit-image takes pixels for points; as squares they have a twelfth more.
        long, short = (length**2 / 16 + 1 / 12 for length in (region.axis_major_length, region.axis_minor_length))
        assert ours[index].item() == pytest.approx(math.log2(long / short) / 2, abs=1e-3)
