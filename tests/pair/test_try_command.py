"""``tokentrim try`` on a script as somebody has it, in processes of their own."""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tokentrim_hooks.report.record import read_report

MODEL = """
from tokentrim_hooks.reference.pipeline import ReferencePipeline

class CausalInferencePipeline(ReferencePipeline):
    def __init__(self):
        super().__init__(ReferencePipeline.random(grid=(2, 2)).generator)
"""
SCRIPT = """
import os, sys
import torch
from pipeline.causal_inference import CausalInferencePipeline
from tokentrim_hooks.metrics.writing import write_video

pipeline = CausalInferencePipeline()
noise = torch.randn(1, 24, 3, 8, 8)  # unseeded, as in many a script
noise[:, 12:] *= 3
video = pipeline.inference(noise)[0].permute(0, 2, 3, 1) * 0.25 + 0.5
os.makedirs(sys.argv[1], exist_ok=True)
with open(f"{sys.argv[1]}/a-broken.mp4", "w") as file:
    file.write("no video")
write_video(f"{sys.argv[1]}/video.mp4", video.clamp(0, 1).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy())
"""
NO_VIDEO = SCRIPT.replace("write_video(", "print(").replace("a-broken.mp4", "text")
BROKEN = SCRIPT + "open(f'{sys.argv[1]}/video.mp4', 'w').write('no video either')\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "__init__.py").write_text("")
    (folder / "pipeline" / "causal_inference.py").write_text(MODEL)
    (folder / "inference.py").write_text(SCRIPT)
    return folder


def attempt(project, *arguments, launcher=("-m",), **environment):
    command = [sys.executable, *launcher, "tokentrim_hooks", "try", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, timeout=500)


def test_one_command_gives_both_videos_and_a_verdict(project):
    (project / "run.toml").write_text("[policies.drift]\nsensitivity = 0\n")
    given = ["--config", "run.toml", "--policy", "drift", "inference.py", "videos"]
    done = attempt(project, *given)
    assert done.returncode == 0, done.stderr
    folder = project / "runs" / "try"
    found = json.loads((folder / "try.json").read_text())
    assert found["again"] == 0 and found["apart"] > 0 and len(found["pruned"]) > 0, "the seeds were set"
    assert done.stdout.startswith(found["headline"]) and all(words in done.stdout for words in found["sentences"])
    assert "left out: " in done.stderr and "broken.mp4 cannot be read as a video" in done.stderr
    assert "tokentrim try --pairs 8 --config run.toml --policy drift inference.py videos" in done.stdout
    page = (folder / "try.html").read_text()
    assert 'src="unpatched/video.mp4"' in page and 'src="patched/video.mp4"' in page
    assert 'href="patched/log/report.html"' in page and (folder / "patched" / "log" / "report.html").is_file()
    assert read_report(folder / "patched" / "log").settings["policy.sensitivity"] == 0
    assert not list((project / "videos").iterdir()), "each run began as the one before it"
    again = attempt(project, "--once", "--sensitivity", "0", "--pairs", "2", "-m", "inference", "videos")
    assert again.returncode == 0 and "(--once)" in again.stdout, again.stderr
    assert "too few" in again.stdout and (project / "runs" / "try-2" / "seed-1" / "patched").is_dir()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('no model')", "no model was patched, so there is nothing to compare."),
        (SCRIPT + "\nraise ValueError('mine')", "the patched run of the script failed with status 1."),
        (NO_VIDEO, "the script wrote no video; looked at: "),
        (BROKEN, "/patched/a-broken.mp4 cannot be read as a video: "),
    ],
)
def test_what_cannot_be_compared_is_told_and_nothing_else_is_run(project, script, words):
    (project / "wrong.py").write_text(script)
    done = attempt(project, "--out", "wrong", "wrong.py", "videos")
    assert done.returncode == 2 and re.search(f"^tokentrim try: .*{re.escape(words)}", done.stderr, re.MULTILINE)
    assert "unpatched" not in done.stderr
    assert (project / "wrong").exists() == ("no model" not in words), "nothing is left where nothing was patched"


def test_an_unknown_policy_ends_it_before_anything_runs(project):
    done = attempt(project, "--policy", "drif", "inference.py", "never")
    assert done.returncode == 2 and "did you mean 'drift'?" in done.stderr and not (project / "never").exists()


def test_ctrl_c_leaves_log_and_report_of_the_run_that_it_met(project):
    """It reaches the run's own process too, which is waited for."""
    (project / "endless.py").write_text(SCRIPT + "\nprint('made', flush=True)\nimport time\ntime.sleep(600)\n")
    command = [sys.executable, "-m", "tokentrim_hooks", "try", "--out", "stopped", "endless.py", "videos"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores Ctrl-C and hands that down, so tests that run in one would wait for ever.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"cwd": project, "env": variables, "start_new_session": True, "preexec_fn": heeds}
    with subprocess.Popen(command, **options, **streams) as process:
        assert process.stdout.readline() == "made\n"
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1] == "tokentrim try: stopped by Ctrl-C; what was finished until then is kept."
    log = project / "stopped" / "patched" / "log"
    assert len(read_report(log)) == 8 and (log / "report.html").is_file()


@pytest.mark.slow
def test_under_torchrun(project):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    given = ("--once", "--out", "many", "--sensitivity", "0", "inference.py", "videos")
    done = attempt(project, *given, launcher=launcher)
    assert done.returncode == 0, done.stderr
    folder = project / "many"
    assert (folder / "try.html").is_file()
    assert {log.parent.name for log in folder.glob("patched/log/*/chunks.jsonl")} == {"rank-0", "rank-1"}
