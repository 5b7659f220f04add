"""Reading videos, and the command that measures them."""

import json

import av
import numpy as np
import pytest

from tokentrim_hooks.cli.main import main
from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.metrics.video import VideoFile, read_video
from tokentrim_hooks.metrics.writing import write_video


@pytest.fixture
def grey(tmp_path):
    return write_video(tmp_path / "grey.mp4", [np.full((32, 48, 3), 128, np.uint8)] * 12, fps=8)


def stream(path, width, height):
    """Four frames in H.264 without a container, so that two streams may stand one behind the other."""
    with av.open(str(path), "w", format="h264") as container:
        video = container.add_stream("libx264", rate=8)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 99, np.uint8), format="rgb24")
        container.mux([*(packet for _ in range(4) for packet in video.encode(frame)), *video.encode()])
    return path.read_bytes()


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
    assert "colour shift" in capsys.readouterr().out


def test_json_on_standard_output_is_all_that_stands_there(grey, capsys):
    assert main(["metrics", str(grey), "--json", "-"]) == 0
    (values,) = json.loads(capsys.readouterr().out).values()
    assert values["frames"] > 0 and "windows" in values


def test_the_command_shows_twelve_rows_or_all_and_what_differs(grey, capsys):
    def rows():
        lines = capsys.readouterr().out.splitlines()
        rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
        return lines[rule - 1], lines[rule + 1 : lines.index("", rule)]

    assert main(["metrics", str(grey)]) == 0
    heads, short = rows()
    assert not heads.endswith("difference") and 4 <= len(short) <= 12
    copy = grey.with_name("copy.mp4")
    copy.write_bytes(grey.read_bytes())
    assert main(["metrics", str(grey), str(copy), "--all"]) == 0
    heads, whole = rows()
    assert heads.split()[-1] == "difference" and len(whole) > 20 and all(row.endswith("+0") for row in whole)


def test_a_file_is_read_frame_by_frame(grey):
    file = VideoFile.of(grey)
    assert (file.fps, file.expected, file.count()) == (pytest.approx(8), 12, 12)
    frames, _ = read_video(grey)
    picked = file.pick([3, 11, 40])
    assert picked.keys() == {3, 11} and (picked[3] / np.float32(255) == frames[3]).all()
    assert file.pick([]) == {}


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
    assert main(["metrics", str(bad), "--period", "0"]) == 2


def test_a_video_that_breaks_off_says_where(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    whole = write_video(tmp_path / "whole.mp4", noise, fps=8)
    with av.open(str(whole)) as container:
        places = sorted((packet.pos, packet.size) for packet in container.demux(video=0) if packet.size)
    content = bytearray(whole.read_bytes())
    for begin, size in places[len(places) // 2 :]:
        content[begin : begin + size] = bytes(size)
    (tmp_path / "broken.mp4").write_bytes(content)
    assert main(["metrics", str(tmp_path / "broken.mp4")]) == 2
    said = capsys.readouterr().err
    assert "is damaged or cut off behind frame " in said and " of 60.\nMake it anew" in said, said


def test_scores_are_in_the_json_too(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"scene": [0.4, []]}')
    assert main(["metrics", "--vbench", str(tmp_path / "x.json"), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["vbench"]
    assert found["total"] is None and "scene" not in found["missing"] and len(found["missing"]) == 15


@pytest.mark.parametrize(("expected", "asked"), [(0, False), (12, False), (13, False), (60, True)])
def test_one_that_ends_before_its_header_says_is_asked_about(grey, expected, asked, monkeypatch, capsys):
    """As a file in which whole clusters are missing: ffmpeg reads it to its end."""
    monkeypatch.setattr(VideoFile, "of", lambda path: VideoFile(path, 8.0, expected))
    assert main(["metrics", str(grey)]) == 0
    said = capsys.readouterr().err
    assert ("ends at frame 12, where its header says 60; is it cut off?" in said) == asked == bool(said)


@pytest.mark.parametrize("period", ["1", "12", "500"])
def test_a_period_without_a_boundary_is_told(grey, period, capsys):
    assert main(["metrics", str(grey), "--period", period]) == 0
    said = capsys.readouterr()
    assert f"--period {period} leaves no boundary to compare among 12 frames" in said.err and "nan" not in said.out


@pytest.mark.parametrize("frames", [1, 12])
def test_nothing_drifts_in_one_frame(tmp_path, frames, capsys):
    video = write_video(tmp_path / "v.mp4", np.full((frames, 32, 48, 3), 0.5), fps=8)
    assert main(["metrics", str(video)]) == (2 if frames == 1 else 0)
    assert ("holds one frame, in which nothing moves" in capsys.readouterr().err) == (frames == 1)


def test_frames_of_two_sizes_and_a_video_named_twice_are_refused(grey, tmp_path, capsys):
    (tmp_path / "both.h264").write_bytes(stream(tmp_path / "a.h264", 48, 32) + stream(tmp_path / "b.h264", 48, 64))
    assert main(["metrics", str(grey), str(tmp_path / "both.h264")]) == 2
    assert "both.h264 changes its size: 48x32 and 48x64.\nScale it" in capsys.readouterr().err
    assert main(["metrics", str(grey), str(grey)]) == 2 and "is given twice" in capsys.readouterr().err


def test_an_end_of_line_in_a_name_ends_no_line(grey, tmp_path, capsys):
    video = grey.rename(tmp_path / "two\nlines.mp4")
    assert main(["metrics", str(video)]) == 0
    said = capsys.readouterr().out
    assert "two\\nlines.mp4: 12 frames" in said and not any(line.startswith("lines.mp4") for line in said.splitlines())
    assert main(["report", str(tmp_path / "no\nfolder")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tokentrim report: no such folder: ")


def test_scores_are_read_before_any_video_is(grey, tmp_path, capsys):
    (tmp_path / "no.json").write_text("no")
    assert main(["metrics", str(grey), "--vbench", str(tmp_path / "no.json")]) == 2
    said = capsys.readouterr()
    assert not said.out and "is not a VBench result file" in said.err


def test_what_is_written_plays_in_a_browser_and_cannot_be_nothing(tmp_path):
    odd = np.random.default_rng(0).random((5, 33, 47, 3))
    file = write_video(tmp_path / "odd.mp4", odd, fps=23.976)
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.width, stream.height) == ("h264", "yuv420p", 46, 32)
        assert float(stream.average_rate) == pytest.approx(23.976, abs=0.01)
    with pytest.raises(VideoError, match="there is no frame"):
        write_video(tmp_path / "none.mp4", [])
    with pytest.raises(VideoError, match="differ in size"):
        write_video(tmp_path / "two.mp4", [odd[0], odd[0, :16]])
    with pytest.raises(VideoError, match=r"cannot write .*No such file"):
        write_video(tmp_path / "no" / "folder.mp4", odd)
