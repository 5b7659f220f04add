"""``tokentrim demo``, through ``main`` as the console script calls it, on a tiny untrained model."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tokentrim_hooks.cli.main import main

CHUNKS, SEEDS, FAULT_CHUNKS = 4, 2, 11


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder and printed text of one small demo."""
    folder = tmp_path_factory.mktemp("demo") / "deep" / "out"
    command = [sys.executable, "-m", "tokentrim_hooks", "demo", "--untrained", "--fast", "--out", str(folder)]
    done = subprocess.run(
        [*command, "--seeds", str(SEEDS), "--chunks", str(CHUNKS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_sentences_come_first_then_the_table_then_the_files(demo):
    said = demo[1].splitlines()
    assert [said[i].partition(":")[0] for i in (0, 2, 4)] == ["What drifts", "The fault", "Slow drift"]
    assert said[6].startswith("Another policy, commit window 6 + row moments, on the burning model: ")
    assert said[8].startswith("Another policy, commit window 6 + row moments, on the fading model: ")
    assert said[10].split()[:3] == ["measure", "unpatched", "patched"]
    assert demo[1].startswith((demo[0] / "table.txt").read_text()) and "Files in " in demo[1]


def test_every_written_file_is_named_and_there(demo):
    folder, text = demo
    listed = text.partition("Files in ")[2].splitlines()[1:]
    named = [name for line in listed for name in line.partition(":")[0].strip().split(", ")]
    files = [path / "report.html" if path.is_dir() else path for path in folder.iterdir()]
    assert sorted(named) == sorted(str(path.relative_to(folder)) for path in files)
    assert all(path.is_file() for path in files)


@pytest.mark.parametrize(("name", "chunks"), [("fault", FAULT_CHUNKS), ("burning", CHUNKS), ("fading", CHUNKS)])
def test_a_film_has_every_frame_and_plays_over_and_over(demo, name, chunks):
    with Image.open(demo[0] / f"{name}.gif") as film:
        assert (film.n_frames, film.info["loop"]) == (3 * (1 + chunks), 0)
        assert film.width > 3 * 256 and film.width % 2 == film.height % 2 == 0
        film.seek(film.n_frames - 1)
        assert film.info["duration"] == 1500, "the end stays before it begins again"


def test_all_versions_begin_with_the_given_chunk(demo):
    with Image.open(demo[0] / "fading.gif") as film:
        first = film.convert("RGB")
    left, top, side = 12, 12 + 22 + 8 + 18 + 2, 256
    shown = [first.crop((left + i * (side + 6), top, left + i * (side + 6) + side, top + side)) for i in range(4)]
    assert len({image.tobytes() for image in shown}) == 1
    assert len(shown[0].getcolors(side * side)) > 20, "a picture"


def test_figures_are_those_of_the_table(demo):
    data = json.loads((demo[0] / "results.json").read_text())
    assert data["settings"]["weights"] == "untrained" and "torch" in data["settings"]["versions"]
    off, paper, _ = data["fading"]
    assert (off["setting"], paper["setting"], off["seeds"]) == ("off", "paper first-step", [1, 2])
    mean = sum(off["values"]["motion error @ chunks 3-4"]) / SEEDS
    row = [line for line in demo[1].splitlines() if line.strip().startswith("motion error")][-1]
    assert f"  {mean:.3f} " in row and row.endswith("too few pairs")


def test_the_report_holds_one_record_per_chunk_and_video(demo):
    lines = (demo[0] / "report" / "chunks.jsonl").read_text().splitlines()
    assert len(lines) == SEEDS * (1 + FAULT_CHUNKS)
    assert {json.loads(line)["sample"] for line in lines} == set(range(SEEDS))


@pytest.mark.parametrize("module", ["scipy", "safetensors", "PIL"])
def test_a_missing_extra_is_named(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--untrained", "--fast", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"needs {module}, which is not installed.\nInstall it: pip install " in message and "[demo]'" in message
    assert not list(tmp_path.iterdir())
