"""The command line, through ``main`` as the console script calls it, on a tiny untrained model."""

import json
import re
import subprocess
import sys

import imageio.v2 as imageio
import pytest
import torch
from PIL import Image

from tokentrim_hooks.cli.main import COMMANDS, main
from tokentrim_hooks.experiments.demo.runs import Size, roll_out_all
from tokentrim_hooks.reference.pipeline import ReferencePipeline

CHUNKS, SEEDS = 4, 2


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


def test_every_written_file_is_named_and_there(demo):
    folder, text = demo
    named = re.findall(r"^  (\S+)$", text.partition("Written:")[2], re.MULTILINE)
    files = [path / "report.html" if path.is_dir() else path for path in folder.iterdir()]
    assert sorted(named) == sorted(str(path) for path in files)
    assert all(path.is_file() for path in files)
    assert {path.name for path in folder.iterdir()} == {
        "table.txt", "results.json", "drift.png", "fault.png", "side_by_side.mp4", "report", "report-fault"
    }  # fmt: skip


def test_the_film_has_every_frame(demo):
    with imageio.get_reader(demo[0] / "side_by_side.mp4") as film:
        frames = [frame for frame in film]  # list() would ask for its length, which is unknown
    assert len(frames) == 3 * (1 + CHUNKS)
    assert frames[0].shape == (_even(60 + 172), _even(SEEDS * (3 * 164 + 16) + 12), 3)
    assert frames[0].std() > 20, "not an empty picture"


def test_the_sheets_show_truth_and_both_arms(demo):
    with Image.open(demo[0] / "drift.png") as sheet:
        assert sheet.width == max(150 + 5 * 102 + 6, 760)
        given = [sheet.crop((150, y, 246, y + 96)) for y in _rows(sheet)]
    assert len(given) == SEEDS * 3
    for scene in range(SEEDS):
        one, two, three = given[3 * scene : 3 * scene + 3]
        assert one.tobytes() == two.tobytes() == three.tobytes(), "all arms begin with the given chunk"
        assert len(one.getcolors(96 * 96)) > 20, "a picture"
    with Image.open(demo[0] / "fault.png") as sheet:
        assert sheet.height > 2 * 4 * 96


def test_figures_agree_with_the_table(demo):
    data = json.loads((demo[0] / "results.json").read_text())
    assert data["settings"]["weights"] == "untrained" and data["settings"]["scenes"] == SEEDS
    assert len(data["drift"]) == 3 * 6 and set(data["fault"]) == {"context", "chunk"}
    rows = (demo[0] / "table.txt").read_text().splitlines()
    for line in data["drift"]:
        assert line["verdict"] == "too few pairs"
        assert any(line["metric"] in row and f"{line['base']:.3f}" in row and line["verdict"] in row for row in rows)


def test_reports_hold_one_record_a_chunk_and_video(demo):
    lines = (demo[0] / "report" / "chunks.jsonl").read_text().splitlines()
    assert len(lines) == SEEDS * (1 + CHUNKS)
    assert {json.loads(line)["sample"] for line in lines} == set(range(SEEDS))


def test_arms_are_paired_until_the_first_prune():
    runs = roll_out_all(ReferencePipeline.random(grid=(8, 8)), Size(2, 6, 3, 1, seed=3), lambda: None)
    base, treated = runs.drift["unpatched"], runs.drift["tokentrim"]
    for video in range(2):
        pruned = [r.chunk for r in treated.report if r.pruned and r.sample == video]
        same = 3 * min([*pruned, 7])
        assert torch.equal(base.video[video, :same], treated.video[video, :same])
    assert treated.video.shape == (2, 21, 3, 32, 32)
    assert sum(r.pruned for r in runs.fault["chunk"].report) > 0, "nothing was pruned, so nothing was tested"
    assert not torch.equal(runs.fault["unpatched"].video, runs.fault["chunk"].video)


@pytest.mark.parametrize("module", ["scipy", "safetensors", "PIL"])
def test_a_missing_extra_is_named(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--untrained", "--fast", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"needs {module}" in message and "pip install 'tokentrim-hooks[demo]'" in message
    assert not list(tmp_path.iterdir())


def test_adapters_lists_them(capsys):
    assert main(["adapters"]) == 0
    assert "self-forcing" in capsys.readouterr().out


def test_detect_prints_every_reason(capsys):
    target = "tokentrim_hooks.reference.pipeline:ReferencePipeline.random"
    assert main(["detect", target]) == 0
    out = capsys.readouterr().out
    assert re.search(r"self-forcing\s.*yes", out)
    assert main(["detect", "torch.nn:Identity"]) == 1
    assert not re.search(r"\byes\b", capsys.readouterr().out)


def test_detect_takes_a_module_of_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_model_for_detect.py").write_text("import torch\nmodel = torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert main(["detect", "my_model_for_detect:model"]) == 1, "a module is callable, but it is the model itself"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.nn", "must read package.module:factory"),
        ("no_such_package:x", "No module named 'no_such_package'"),
        ("torch.nn:Nothing", "cannot import torch.nn:Nothing"),
    ],
)
def test_detect_says_what_is_wrong(target, message, capsys):
    assert main(["detect", target]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--seeds", "0"], ["detect"]])
def test_wrong_use_is_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: tokentrim" in capsys.readouterr().err


def test_every_command_explains_itself(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"usage: tokentrim {name}" in capsys.readouterr().out


def _even(size):
    return size + size % 2


def _rows(sheet):
    """Tops of the picture rows: where the first column turns from paper to picture."""
    column = [sheet.getpixel((152, y)) != (255, 255, 255) for y in range(sheet.height)]
    starts, y = [], 0
    while y < sheet.height:
        if all(column[y : y + 90]) and len(column[y : y + 90]) == 90:
            starts.append(y)
            y += 96
        y += 1
    return starts
