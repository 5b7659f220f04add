"""``tokentrim run``: somebody's script, unmodified, with the model patched as it is constructed."""

import os
import re
import subprocess
import sys

import pytest

from tokentrim_hooks.report.record import read_report

SCRIPT = """
import sys
import torch
from pipeline.causal_inference import CausalInferencePipeline

pipeline = CausalInferencePipeline()
torch.manual_seed(0)
noise = torch.randn(1, 24, 3, 8, 8)
noise[:, 12:] *= 3  # the second half is another world: drift for sure
video = pipeline.inference(noise)
torch.save(video, sys.argv[1])
if len(sys.argv) > 2:
    raise RuntimeError("crash at the end")
"""


@pytest.fixture
def project(project):
    (project / "inference.py").write_text(SCRIPT)
    return project


def tokentrim(project, *arguments, **environment):
    command = [sys.executable, "-m", "tokentrim_hooks", "run", *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, timeout=300)


def test_script_runs_patched_and_leaves_a_report(project):
    done = tokentrim(project, "--out", "log", "--sensitivity", "0", "inference.py", "video.pt")
    assert done.returncode == 0, done.stderr
    report = read_report(project / "log")
    assert len(report) == 8 and report.triggers > 0
    assert report.settings["policy.sensitivity"] == 0
    assert (project / "log" / "report.html").is_file()
    assert "chunk   7" in done.stderr, "the progress line"


def test_observing_changes_nothing(project):
    plain = subprocess.run([sys.executable, "inference.py", "plain.pt"], cwd=project, timeout=300)
    assert plain.returncode == 0
    assert tokentrim(project, "--observe", "--quiet", "inference.py", "video.pt").returncode == 0
    assert (project / "plain.pt").read_bytes() == (project / "video.pt").read_bytes().replace(b"video/", b"plain/")


def test_log_is_complete_when_the_script_crashes(project):
    done = tokentrim(project, "--out", "log", "--quiet", "inference.py", "video.pt", "crash")
    assert done.returncode != 0 and "crash at the end" in done.stderr
    assert len(read_report(project / "log")) == 8
    assert (project / "log" / "report.html").is_file()


def test_options_from_a_toml_file(project):
    (project / "options.toml").write_text('probe = "candidate"\n[policy]\nfraction = 0.25\nwarmup = 1\n')
    options = ("--config", "options.toml", "--warmup", "3", "--out", "log", "--quiet")
    done = tokentrim(project, *options, "inference.py", "v")
    assert done.returncode == 0, done.stderr
    settings = read_report(project / "log").settings
    assert (settings["probe"], settings["policy.fraction"], settings["policy.warmup"]) == ("candidate", 0.25, 3)


def test_mistakes_have_a_clear_message(project):
    (project / "bad.toml").write_text("[policy]\nfracton = 0.2\n")
    (project / "empty.py").write_text("")
    cases = {
        ("--config", "bad.toml", "inference.py", "v"): "policy.fracton is not an option",
        ("--fraction", "-1", "inference.py", "v"): "fraction must be",
        ("none.py",): "no such script",
        ("empty.py",): "no model was patched",
    }
    for arguments, words in cases.items():
        done = tokentrim(project, *arguments)
        assert done.returncode != 0 and words in done.stderr, (arguments, done.stderr)


def test_report_shows_latents_unless_they_are_not_wanted(project):
    assert tokentrim(project, "--out", "log", "--quiet", "inference.py", "v").returncode == 0
    assert len(list((project / "log" / "thumbs").glob("v0-c*-s0.png"))) == 8
    assert tokentrim(project, "--out", "log", "--quiet", "--no-thumbnails", "inference.py", "v").returncode == 0
    assert (project / "log" / "report.html").is_file()
    assert not list((project / "log" / "thumbs").iterdir()), "pictures of the run before"


def test_processes_of_torchrun_do_not_share_a_log(project):
    options = ("--out", "log", "--quiet", "inference.py", "v")
    assert tokentrim(project, *options, RANK="1", WORLD_SIZE="2").returncode == 0
    assert len(read_report(project / "log" / "rank-1")) == 8
    assert not (project / "log" / "chunks.jsonl").exists()
    assert tokentrim(project, *options, RANK="0", WORLD_SIZE="1").returncode == 0
    assert len(read_report(project / "log")) == 8


def test_what_stands_behind_the_script_is_the_script_s(project):
    """Also where it looks like an option of ours, in full or abbreviated."""
    (project / "echo.py").write_text("import sys; print(sys.argv)")
    given = ["--o", "1", "--out", "2", "--observe", "--p=3", "-h", "--", "x"]
    done = tokentrim(project, "--out", "log", "echo.py", *given)
    assert done.stdout == f"{['echo.py', *given]}\n"
    assert (project / "log").is_dir() and not (project / "2").exists()


def test_policies_are_named_in_order_with_options_from_the_file(project):
    (project / "run.toml").write_text(
        "[policies.commit-window]\nframes = 3\n\n[policies.latent-moments]\nchannels = [0]\n"
    )
    done = tokentrim(project, "--out", "log", "--config", "run.toml", "--quiet", "inference.py", "video.pt")
    assert done.returncode == 0, done.stderr
    report = read_report(project / "log")
    assert report.settings["policy.CommitWindow.frames"] == 3
    assert {act["policy"] for record in report for act in record.acts} == {"CommitWindow", "LatentMoments"}
    flags = ["--policy", "drift", "--policy", "commit-window", "--sensitivity", "0"]
    done = tokentrim(project, "--out", "log", "--config", "run.toml", "--quiet", *flags, "inference.py", "video.pt")
    assert done.returncode == 0, done.stderr
    report = read_report(project / "log")
    assert report.triggers > 0 and report.settings["policy.sensitivity"] == 0
    assert {act["policy"] for record in report for act in record.acts} == {"CommitWindow"}


@pytest.mark.parametrize(
    ("flags", "file", "words"),
    [
        (["--policy", "drif"], "", "no policy named 'drif'; installed: adaptive, commit-window"),
        (["--policy", "commit-window", "--fraction", "0.2"], "", "fraction: options of the policy drift"),
        (["--policy", "commit-window"], "[policies.commit-window]\nframe = 1", "commit-window: .*'frame'"),
        (["--policy", "commit-window"], "[policies.commit-window]\nframes = -1", "commit-window: frames must be"),
        (["--policy", "commit-window", "--observe"], "", "CommitWindow would; leave one of them out"),
        ([], "policies = 3", "policies must be tables"),
    ],
)
def test_wrong_policies_are_refused_before_the_script_begins(project, flags, file, words):
    (project / "run.toml").write_text(file)
    done = tokentrim(project, "--config", "run.toml", *flags, "inference.py", "never.pt")
    assert done.returncode == 2 and re.search(words, done.stderr), done.stderr
    assert not (project / "never.pt").exists()
