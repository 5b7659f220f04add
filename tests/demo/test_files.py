"""Pictures: what is shown where."""

import numpy as np
import torch
from PIL import Image

from tokentrim_hooks.experiments.demo.pictures import first_pruned_first
from tokentrim_hooks.report.filmstrip import (
    CUT,
    KEPT,
    UNJUDGED,
    Tile,
    bar,
    beside,
    enlarged,
    frames_of,
    save_film,
    strip,
    verdicts,
)
from tokentrim_hooks.report.record import ChunkRecord


def record(chunk, **more):
    return ChunkRecord(0, chunk, 0, 3 * chunk, 3, {"first": 1}, grid=(8, 8), **more)


def test_a_film_is_a_gif_that_plays_over_and_over(tmp_path):
    frames = [Image.new("RGB", (20, 10), (40 * i, 0, 0)) for i in range(5)]
    path = save_film(frames, tmp_path / "film.gif", [100] * 4 + [700])
    with Image.open(path) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (5, (20, 10), 0)
        film.seek(3)
        assert film.convert("RGB").getpixel((5, 5)) == (120, 0, 0), "colours stay what they are"


def test_frames_keep_their_pixels_and_clip_what_burns():
    video = torch.tensor([-1.0, 1.0, 3.0, -9.0]).view(1, 1, 2, 2).expand(2, 3, 2, 2)
    first = frames_of(video)[0]
    assert first.shape == (2, 2, 3) and first[..., 0].tolist() == [[0, 255], [255, 0]]
    large = np.asarray(enlarged(Tile(first), 5))
    assert large.shape == (10, 10, 3) and np.array_equal(large[::5, ::5], first)


def test_a_box_outlines_its_pixels_only():
    image = np.asarray(enlarged(Tile(np.zeros((8, 8, 3), np.uint8), [((2, 4, 6, 8), (9, 8, 7))]), 4))
    rows, columns = np.nonzero(image[..., 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 31, 8, 23)
    assert not image[20:28, 12:20].any(), "the inside stays visible"


def test_verdicts_have_three_colours():
    records = [record(0), record(1, severity=1.0), record(2, severity=9.0, pruned=True)]
    assert verdicts(records) == [UNJUDGED, KEPT, CUT]


def test_a_verdict_stands_under_what_was_shown_then():
    tiles = [Image.new("RGB", (96, 96))] * 3
    picture = np.asarray(strip("label", tiles, [KEPT, CUT, KEPT]))
    orange, green = ((picture == colour).all(-1).any(0).nonzero()[0] for colour in (CUT, KEPT))
    second = 140 + 6 + 96 + 6
    assert abs(orange.mean() - (second + 48)) <= 3, "the middle of the second tile"
    assert green.min() <= 148 and green.max() >= second + 96 + 6 + 90


def test_the_cell_of_now_is_marked():
    plain, marked = (np.asarray(bar([KEPT, CUT], 40, now)) for now in (None, 1))
    differs = (plain != marked).any((0, 2)).nonzero()[0]
    assert differs.min() >= 20


def test_beside_keeps_every_pixel():
    left, right = Image.new("RGB", (3, 5), (1, 2, 3)), Image.new("RGB", (4, 2), (4, 5, 6))
    both = np.asarray(beside([left, right], gap=1))
    assert both.shape == (5, 8, 3) and (both[:, :3] == (1, 2, 3)).all() and (both[:2, 4:] == (4, 5, 6)).all()


def test_the_first_scene_with_a_prune_is_the_large_one_and_all_are_shown():
    quiet, pruned = [record(1), record(2)], [record(1), record(2, pruned=True)]
    assert first_pruned_first([quiet, pruned, quiet, pruned]) == [1, 0, 2, 3]
    assert first_pruned_first([pruned, quiet]) == [0, 1]
    assert first_pruned_first([quiet, quiet]) == [0, 1], "as they were drawn"
