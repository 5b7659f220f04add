"""Files that need something optional, with and without it."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tokentrim_hooks.experiments.demo.command import save_report
from tokentrim_hooks.report.filmstrip import Block, Row, Tile, contact_sheet, enlarge, frames_of, save_video
from tokentrim_hooks.report.record import ChunkRecord, Report

RECORD = ChunkRecord(0, 1, 0, 3, 3, {"first": 1}, severity=1.0, mean=1.0, std=0.1, threshold=2.0, grid=(8, 8))


@pytest.mark.parametrize("missing", ["imageio_ffmpeg", "imageio.v2"])
def test_a_gif_where_no_mp4_can_be_written(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    frames = [Image.new("RGB", (20, 10), (40 * i, 0, 0)) for i in range(5)]
    path = save_video(frames, tmp_path / "film.mp4")
    assert path == tmp_path / "film.gif"
    with Image.open(path) as film:
        assert (film.n_frames, film.size) == (5, (20, 10))


@pytest.mark.parametrize(("missing", "written"), [(None, "report/report.html"), ("jinja2", "report")])
def test_a_report_with_or_without_its_page(missing, written, monkeypatch, tmp_path):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    path = save_report(Report({}, [RECORD]), torch.zeros(6, 3, 32, 32), tmp_path / "report")
    assert path == tmp_path / written and path.exists()
    assert (tmp_path / "report" / "chunks.jsonl").is_file()


def test_frames_keep_their_pixels_and_clip_what_burns():
    video = torch.tensor([-1.0, 1.0, 3.0, -9.0]).view(1, 1, 2, 2).expand(2, 3, 2, 2)
    first = frames_of(video)[0]
    assert first.shape == (2, 2, 3) and first[..., 0].tolist() == [[0, 255], [255, 0]]
    large = np.asarray(enlarge(Tile(first), 5))
    assert large.shape == (10, 10, 3) and np.array_equal(large[::5, ::5], first)


def test_a_box_outlines_its_pixels_only():
    image = np.asarray(enlarge(Tile(np.zeros((8, 8, 3), np.uint8), [((2, 4, 6, 8), (9, 8, 7))]), 4))
    rows, columns = np.nonzero(image[..., 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 31, 8, 23)
    assert not image[20:28, 12:20].any(), "the inside stays visible"


def test_ticks_lie_under_the_columns_they_mean():
    tiles = [Tile(np.zeros((32, 32, 3), np.uint8))] * 3
    sheet = np.asarray(contact_sheet("t", [], ["a", "b", "c"], [Block("", [Row("r", tiles, ticks=[0.5])])]))
    orange = (sheet == (255, 190, 0)).all(-1)
    assert abs(np.nonzero(orange.any(0))[0].mean() - (150 + 102 + 48)) <= 1, "half of the time is the middle column"
