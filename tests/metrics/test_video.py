"""Reading videos, and the command that measures them."""

import json

import imageio.v2 as imageio
import numpy as np
import pytest

from tokentrim_hooks.cli.main import main
from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.metrics.video import read_video


@pytest.fixture
def grey(tmp_path):
    path = tmp_path / "grey.mp4"
    with imageio.get_writer(path, fps=8, codec="libx264", macro_block_size=2) as writer:
        for _ in range(12):
            writer.append_data(np.full((32, 48, 3), 128, np.uint8))
    return path


def test_reads_what_was_written(grey):
    frames, fps = read_video(grey)
    assert frames.shape == (12, 32, 48, 3)
    assert fps == pytest.approx(8)
    assert frames.mean() == pytest.approx(128 / 255, abs=0.01)


def test_command_measures_a_grey_video(grey, tmp_path, capsys):
    out = tmp_path / "m.json"
    assert main(["metrics", str(grey), "--period", "4", "--json", str(out)]) == 0
    found = json.loads(out.read_text())[str(grey)]
    assert found["saturation"] == pytest.approx(0, abs=0.02)
    assert found["motion"] == pytest.approx(0, abs=1e-3)
    assert "colour_shift" in capsys.readouterr().out


def test_unreadable_files_have_a_clear_message(tmp_path, capsys):
    with pytest.raises(VideoError, match="no such video"):
        read_video(tmp_path / "none.mp4")
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video at all")
    with pytest.raises(VideoError, match="cannot be read"):
        read_video(bad)
    assert main(["metrics", str(bad)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["metrics"]) == 2
