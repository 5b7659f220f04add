"""``tokentrim run`` of scripts that go elsewhere: another folder, odd names, streams that are closed, no log left."""

import os
import subprocess
import sys

import pytest

from tokentrim_hooks.report.record import read_report

BEGIN = """
import os, shutil, sys, torch
from pipeline.causal_inference import CausalInferencePipeline

pipeline = CausalInferencePipeline()
"""
END = """
pipeline.inference(torch.randn(1, 9, 3, 8, 8))
"""


def tokentrim(project, *arguments, text="", name="odd.py"):
    (project / name).write_text(BEGIN + text + END)
    command = [sys.executable, "-m", "tokentrim_hooks", "run", *map(str, arguments), name]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("before", "chunks"), [("", 3), ("pipeline.inference(torch.randn(1, 6, 3, 8, 8)); ", 5)])
def test_a_script_that_changes_its_folder_leaves_its_log_where_it_was_asked_for(project, before, chunks):
    (project / "inner").mkdir()
    done = tokentrim(project, "--out", "log", text=f"{before}os.chdir('inner')\n")
    assert done.returncode == 0, done.stderr
    assert "report: log/report.html\n" in done.stderr, "as seen from where the user is"
    assert len(read_report(project / "log")) == chunks
    assert (project / "log" / "report.html").is_file() and any((project / "log" / "thumbs").iterdir())
    assert not list((project / "inner").iterdir())


def test_names_with_spaces_and_letters(project):
    done = tokentrim(project, "--out", "a log \u00e9", "--quiet", name="sp ace \u00e9.py")
    assert done.returncode == 0 and (project / "a log \u00e9" / "report.html").is_file(), done.stderr


def test_a_script_that_closes_its_streams_has_its_report(project):
    done = tokentrim(project, "--out", "log", "--quiet", text="sys.stdout.close(); sys.stderr.close()\n")
    assert done.returncode == 0 and (project / "log" / "report.html").is_file()


def test_a_script_that_takes_its_log_away_is_told(project):
    text = "pipeline.inference(torch.randn(1, 6, 3, 8, 8)); shutil.rmtree('log')\n"
    done = tokentrim(project, "--out", "log", "--quiet", "--no-thumbnails", text=text)
    assert done.returncode == 0 and "no report page: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("status", [0, 3])
def test_on_a_full_disk_the_status_is_still_the_script_s(project, status):
    full = "from tokentrim_hooks.report import files\ndef full(*_): raise OSError(28, 'No space left on device')\n"
    text = f"{full}pipeline.inference(torch.randn(1, 6, 3, 8, 8)); files.Path.replace = full\n"
    leaves = f"\nraise SystemExit({status})\n"
    (project / "full.py").write_text(BEGIN + text + END + leaves)
    command = [sys.executable, "-m", "tokentrim_hooks", "run", "--out", "log", "--quiet", "--no-thumbnails", "full.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert "no report page: " in done.stderr and "run.json: No space left on device" in done.stderr
    assert len(read_report(project / "log")) == 5


def test_a_reader_that_goes_costs_no_report(project):
    (project / "odd.py").write_text(BEGIN + END)
    read, write = os.pipe()
    command = [sys.executable, "-m", "tokentrim_hooks", "run", "--out", "log", "odd.py"]
    with subprocess.Popen(command, cwd=project, stderr=write) as process:
        os.close(write)
        os.close(read)
        process.wait(300)
    assert (project / "log" / "report.html").is_file()
