"""Scenes: the same for the same seed, the truth is the truth, and each variation is what it says."""

import pytest
import torch

from tokentrim_hooks.reference.scenes import scenes, scenes_at

VARIATIONS = [{}, {"kind": "hard"}, {"pan": 0.3}, {"cut": 2}, {"stop": 2}]


def background(scene):
    """Change between neighbouring frames where no sprite is near, [F - 1]."""
    free = (scene.masks.sum(2) == 0)[:, :, None]
    both = (free[:, 1:] & free[:, :-1]).expand_as(scene.video[:, 1:])
    return [float(scene.video.diff(dim=1)[:, f][both[:, f]].abs().mean()) for f in range(both.shape[1])]


@pytest.mark.parametrize("variation", VARIATIONS, ids=str)
def test_scenes_depend_on_nothing_but_their_seed(variation):
    few, many = scenes(5, 3, 12, **variation), scenes(5, 6, 30, **variation)
    for name in ("video", "positions", "masks"):
        assert torch.equal(getattr(few, name), getattr(many, name)[:3, :12])
    for name in ("colors", "palette", "shapes"):
        assert torch.equal(getattr(few, name), getattr(many, name)[:3])
    assert not torch.equal(few.video, scenes(6, 3, 12, **variation).video)


@pytest.mark.parametrize("variation", VARIATIONS, ids=str)
def test_sprites_are_where_and_what_the_truth_says(variation):
    scene = scenes(1, 4, 12, **variation)
    solid = scene.masks > 0.999
    painted = scene.colors[:, None, :, :, None, None].expand(-1, 12, -1, -1, 32, 32)
    shown = scene.video[:, :, None].expand_as(painted)
    where = solid[:, :, :, None].expand_as(painted)
    assert torch.allclose(shown[where], painted[where], atol=1e-2)
    centre = scene.positions[:, :, 1].round().long()
    front = scene.masks[:, :, 1]
    assert all(front[b, f, centre[b, f, 1], centre[b, f, 0]] > 0.9 for b in range(4) for f in range(12))


def test_the_texture_stands_still_unless_it_is_told_to_pan():
    assert max(background(scenes(2, 4, 12))) < 1e-6
    slow, fast = (background(scenes(2, 4, 12, pan=speed)) for speed in (0.1, 0.4))
    assert all(0 < a < b for a, b in zip(slow, fast, strict=True))


def test_hard_scenes_are_busier_than_soft_ones():
    soft, hard = scenes(2, 16, 12), scenes(2, 16, 12, kind="hard")
    assert hard.video.diff(dim=3).abs().mean() > 1.2 * soft.video.diff(dim=3).abs().mean()
    assert min(background(hard)) > 0


@pytest.mark.parametrize("cut", [1, 3])
def test_a_cut_is_at_the_first_frame_of_its_chunk(cut):
    whole, same = scenes(3, 4, 18, cut=cut), scenes(3, 4, 18)
    assert torch.equal(whole.video[:, : 3 * cut], same.video[:, : 3 * cut])
    change = background(whole)
    assert change.index(max(change)) == 3 * cut - 1
    assert max(change) > 0.1
    assert sum(c > 1e-6 for c in change) == 1
    jump = whole.positions.diff(dim=1).norm(dim=-1)
    assert jump[:, 3 * cut - 1].mean() > 2 * jump[:, 3 * cut :].mean()


def test_the_same_sprites_go_on_behind_a_cut():
    whole, same = scenes(3, 4, 18, cut=2), scenes(3, 4, 18)
    assert torch.equal(whole.colors, same.colors)
    assert torch.equal(whole.shapes, same.shapes)


def test_a_sprite_that_stops_stands_still_and_the_other_goes_on():
    scene, same = scenes(4, 4, 18, stop=3), scenes(4, 4, 18)
    assert torch.equal(scene.video[:, :10], same.video[:, :10])
    first, second = scene.positions.diff(dim=1).norm(dim=-1).unbind(2)
    assert (first[:, :9] > 0).all()
    assert (first[:, 9:] == 0).all()
    assert torch.equal(scene.positions[:, :, 1], same.positions[:, :, 1])
    assert (second > 0).all()


def test_moments_of_a_scene_are_frames_of_it():
    when = torch.tensor([0.0, 1.0, 2.0, 90.0, 91.0])
    assert torch.equal(scenes_at(5, 2, when).video, scenes(5, 2, 92).video[:, when.long()])


def test_an_unknown_kind_names_those_there_are():
    with pytest.raises(ValueError, match="soft, hard"):
        scenes(0, 1, 3, kind="soggy")
