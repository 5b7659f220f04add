"""Planted drift: none at strength zero, only what it says, and each measure sees what it is meant for, in order."""

import measures_page as page
import pytest
import torch

from tokentrim_hooks.reference.injection import INJECTIONS, STRENGTHS, without_sprites
from tokentrim_hooks.reference.quality import METRICS, MORE
from tokentrim_hooks.reference.quality_sprites import _centroid, look, place_error, sprites_alive
from tokentrim_hooks.reference.scenes import scenes

SCENE = scenes(2, 4, 9)
BY_NAME = {injection.name: injection.inject for injection in INJECTIONS}
REDRAWN = ("melting", "displacing")
"""These draw the sprites anew, over a background that is guessed where less than a tenth of it shows through."""


@pytest.mark.parametrize("name", BY_NAME)
def test_at_strength_zero_it_is_the_truth(name):
    video = BY_NAME[name](SCENE, 0.0)
    assert video.shape == SCENE.video.shape
    if name in REDRAWN:
        assert (video - SCENE.video).abs().max() < 0.1 and place_error(video, SCENE).max() == 0
    else:
        torch.testing.assert_close(video, SCENE.video, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_same_strength_gives_the_same_video_and_leaves_the_scene(name):
    before = SCENE.video.clone()
    assert torch.equal(BY_NAME[name](SCENE, 0.6), BY_NAME[name](SCENE, 0.6))
    assert torch.equal(before, SCENE.video)


@pytest.mark.parametrize("name", ["melting", "removing"])
def test_what_happens_to_a_sprite_happens_where_it_is(name):
    changed = (BY_NAME[name](SCENE, 1.0) - SCENE.video).abs().amax(2) > 1e-5
    assert changed.any() and not (changed & (SCENE.masks.sum(2) == 0)).any()


@pytest.mark.parametrize("name", [*REDRAWN, "removing"])
def test_what_is_drawn_anew_stays_in_the_range(name):
    assert all(BY_NAME[name](SCENE, strength).abs().max() <= 1 + 1e-5 for strength in STRENGTHS)


def test_noise_is_on_the_background_only():
    changed = (BY_NAME["noise"](SCENE, 1.0) - SCENE.video).abs().amax(2)
    covered = SCENE.masks.sum(2)
    assert changed[covered == 1].max() == 0 and (changed[covered == 0] > 0.01).float().mean() > 0.99


def test_displaced_sprites_keep_their_distance_and_their_size():
    seen = look(BY_NAME["displacing"](SCENE, 1.0), SCENE)
    # Else they may leave the frame, or hide each other.
    inside = ((SCENE.positions - 15.5).square().sum(-1).sqrt() < 10).all(2) & (SCENE.masks.sum((3, 4)) > 40).all(2)
    assert inside.sum() > 5
    assert (seen.ratio[inside] - 1).abs().max() < 0.3
    shown, true = (_centroid(mask)[inside].diff(dim=1).square().sum(-1).sqrt() for mask in (seen.shown, seen.true))
    torch.testing.assert_close(shown, true, atol=2.0, rtol=0)


def test_a_background_without_sprites_shows_none():
    assert sprites_alive(without_sprites(SCENE), SCENE).tolist() == [0.0] * 4


def test_turned_hues_keep_brightness():
    turned = BY_NAME["turning hues"](SCENE, 1.0)
    torch.testing.assert_close(turned.mean(2), SCENE.video.mean(2), atol=1e-5, rtol=0)
    assert (turned - SCENE.video).abs().max() > 0.3


# ---------------------------------------------------------------------------------------------- what measures see

def test_every_measure_is_meant_for_something_and_every_drift_is_seen():
    assert list(page.MEANT) == sorted(page.MEANT, key=[m.name for m in (*METRICS, *MORE)].index)
    assert set(page.MEANT) == {m.name for m in (*METRICS, *MORE)}
    specific = {name: own for name, own in page.MEANT.items() if name != "error to ground truth"}
    assert {name for own in specific.values() for name in own} == set(BY_NAME)
    assert len(STRENGTHS) == 5


@pytest.mark.parametrize("name", page.MEANT)
def test_each_step_of_the_drift_it_is_meant_for_moves_a_measure_on(name):
    for drift in page.MEANT[name]:
        assert page.responses()[name, drift].monotone, drift


@pytest.mark.parametrize("name", page.MEANT)
def test_other_drift_moves_it_little_or_is_named(name):
    named = {*page.MEANT[name], *page.ALSO.get(name, ())}
    others = {drift: page.share(page.responses(), page.MEANT, name, drift) for drift in BY_NAME if drift not in named}
    assert all(size < page.LITTLE for size in others.values()), others


@pytest.mark.parametrize("name", page.MEANT_REAL)
def test_measures_of_real_videos_move_on_with_each_step(name):
    for drift in page.MEANT_REAL[name]:
        assert page.real_responses()[name, drift].monotone, drift
