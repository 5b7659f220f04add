"""``tokentrim run --observer NAME``, with a plugin of observers that lies in tests/fixtures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokentrim_hooks.report.record import read_report

WATCHERS = Path(__file__).parents[1] / "fixtures" / "watchers"

SCRIPT = """
import torch
from pathlib import Path
from pipeline.causal_inference import CausalInferencePipeline

Path("ran").touch()
for seed in range(2):  # two models: the second has a folder of its own
    torch.manual_seed(seed)
    CausalInferencePipeline().inference(torch.randn(1, 6, 3, 8, 8))
"""


@pytest.fixture
def project(project):
    (project / "inference.py").write_text(SCRIPT)
    return project


def tokentrim(project, *arguments):
    command = [sys.executable, "-m", "tokentrim_hooks", "run", "--out", "log", "--quiet", *arguments, "inference.py"]
    environment = {**os.environ, "PYTHONPATH": str(WATCHERS), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


def test_each_model_is_observed_into_its_folder_and_a_broken_observer_is_left_out(project):
    done = tokentrim(project, "--observer", "notes", "--observer", "broken")
    assert done.returncode == 0, done.stderr
    assert "observer 'broken' is left out" in done.stderr and "No module named 'wobble'" in done.stderr
    for folder in (project / "log", project / "log" / "model-2"):
        assert len(read_report(folder)) == 2
        assert (folder / "notes.txt").read_text() == "0 1"


def test_the_file_names_observers_too(project):
    (project / "options.toml").write_text('observers = ["notes"]\n')
    done = tokentrim(project, "--config", "options.toml", "--observer", "notes")
    assert done.returncode == 0, done.stderr
    assert (project / "log" / "notes.txt").read_text() == "0 1"


@pytest.mark.parametrize(
    ("line", "words"),
    [('observers = ["nobody"]', "no observer named 'nobody'; installed: broken, "), ('observers = "notes"', "a list")],
)
def test_a_wrong_name_ends_it_before_the_script_begins(project, line, words):
    (project / "options.toml").write_text(line + "\n")
    done = tokentrim(project, "--config", "options.toml")
    assert done.returncode == 2 and words in done.stderr
    assert not (project / "ran").exists()
