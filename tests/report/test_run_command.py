"""``tokentrim run``: somebody's script, unmodified, with the model patched as it is constructed."""

import os
import re
import subprocess
import sys
import types

import pytest
import wrapt

from tokentrim_hooks.cli.script.runner import Run
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
    assert done.stderr.startswith("tokentrim run: CausalInferencePipeline is patched, by the adapter self-forcing\n")


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
        ("--out", "empty", "empty.py"): "no model was patched: the script constructed no class that an adapter names",
    }
    for arguments, words in cases.items():
        done = tokentrim(project, *arguments)
        assert done.returncode != 0 and words in done.stderr, (arguments, done.stderr)
        assert done.stderr.startswith("tokentrim run: "), "nothing else comes first"
    assert not (project / "empty").exists(), "a run that patched nothing leaves no folder"


def test_report_shows_latents_unless_they_are_not_wanted(project):
    assert tokentrim(project, "--out", "log", "--quiet", "inference.py", "v").returncode == 0
    assert len(list((project / "log" / "thumbs").glob("v0-c*-s0.png"))) == 8
    assert tokentrim(project, "--out", "bare", "--quiet", "--no-thumbnails", "inference.py", "v").returncode == 0
    assert (project / "bare" / "report.html").is_file()
    assert not list((project / "bare").rglob("*.png"))


def test_processes_of_torchrun_do_not_share_a_log(project):
    options = ("--out", "log", "--quiet", "inference.py", "v")
    assert tokentrim(project, *options, RANK="1", WORLD_SIZE="2").returncode == 0
    assert len(read_report(project / "log" / "rank-1")) == 8
    assert not (project / "log" / "chunks.jsonl").exists()
    assert tokentrim(project, *options, RANK="0", WORLD_SIZE="1").returncode == 0
    assert len(read_report(project / "log-2")) == 8


def test_ranks_of_one_launch_share_a_folder_and_those_of_the_next_another(project):
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}
    options = ("--out", "log", "--quiet", "--no-thumbnails", "inference.py", "v")
    for rank in ("0", "1", "0"):
        assert tokentrim(project, *options, RANK=rank, **launch).returncode == 0
    assert sorted(path.parent.name for path in project.glob("log/*/chunks.jsonl")) == ["rank-0", "rank-1"]
    assert [path.parent.name for path in project.glob("log-2/*/chunks.jsonl")] == ["rank-0"]


def test_no_run_touches_an_older_log(project):
    for number, folder in enumerate(("log", "log-2", "log-3"), 1):
        done = tokentrim(project, "--out", "log", "--quiet", "inference.py", "v")
        assert done.returncode == 0 and len(read_report(project / folder)) == 8
        assert (f"log holds an earlier run, so this one goes to {folder}" in done.stderr) == (number > 1)
    (project / "empty.py").write_text("")
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}
    done = tokentrim(project, "--out", "log", "empty.py")
    assert done.returncode == 1 and "report" not in done.stderr, "an old log is not this run's"
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()} == before


def test_a_module_runs_as_python_m_would(project):
    (project / "package").mkdir()
    (project / "package" / "__init__.py").write_text("")
    (project / "package" / "make.py").write_text(SCRIPT + "\nprint(__name__, __package__, sys.argv[1:])\n")
    done = tokentrim(project, "--out", "log", "--quiet", "-m", "package.make", "v")
    assert done.returncode == 0 and done.stdout == "__main__ package ['v']\n", done.stderr
    assert len(read_report(project / "log")) == 8


def test_a_seed_makes_two_runs_alike_and_unpatched_patches_nothing(project):
    draws = "random.random(), numpy.random.rand(), torch.rand(2)"
    (project / "draw.py").write_text(f"import random, numpy, torch; print({draws})")
    said = [tokentrim(project, "--unpatched", "--seed", seed, "draw.py").stdout for seed in ("1", "1", "2")]
    assert said[0] == said[1] != said[2] and not (project / "runs").exists()


def test_the_status_is_the_script_s(project):
    (project / "leaves.py").write_text("import sys; sys.exit(3)")
    assert tokentrim(project, "--out", "log", "leaves.py").returncode == 3
    (project / "raises.py").write_text("def inner():\n    open('none')\ninner()\n")
    done = tokentrim(project, "--out", "log", "raises.py")
    assert done.returncode == 1 and "FileNotFoundError: [Errno 2]" in done.stderr, "the script's, not ours"
    first = next(line for line in done.stderr.splitlines() if line.startswith("  File"))
    assert "raises.py" in first, "the traceback begins in the script"


@pytest.mark.parametrize(
    ("script", "status"),
    [("import sys; sys.exit(3)", 3), ("import sys; sys.exit('needs --prompt')", 1), ("def broken(:", 1)],
)
def test_a_script_that_fails_before_it_has_a_model_is_not_told_of_adapters(project, script, status):
    (project / "fails.py").write_text(script)
    done = tokentrim(project, "--out", "log", "fails.py")
    assert done.returncode == status
    words = f"no model was patched: the script failed with status {status} before it made one.\nSee what it says above"
    theirs, _, _ = done.stderr.partition("tokentrim run: ")
    assert words in done.stderr and "tokentrim_hooks" not in theirs, "no frame of ours before it"
    assert ("needs --prompt" in theirs, "SyntaxError" in theirs) == ("prompt" in script, "broken" in script)
    assert done.stderr.count("needs --prompt") == ("prompt" in script)
    assert "tokentrim adapters" not in done.stderr and len(list((project / "log").glob("*"))) == 0


def test_ctrl_c_is_one_line_and_leaves_log_and_report(project):
    interrupted = SCRIPT.replace("if len(sys.argv) > 2:", "raise KeyboardInterrupt\nif 0:")
    (project / "interrupted.py").write_text(interrupted)
    done = tokentrim(project, "--out", "log", "--quiet", "interrupted.py", "v")
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("tokentrim run: stopped by Ctrl-C")
    assert len(read_report(project / "log")) == 8 and (project / "log" / "report.html").is_file()


def test_progress_stands_beside_tqdm_s(project):
    (project / "bar.py").write_text("import tqdm\n" + SCRIPT + "\nfor _ in tqdm.tqdm(range(3)): pass\n")
    done = tokentrim(project, "--out", "log", "bar.py", "v")
    lines = [line for line in done.stderr.splitlines() if line.startswith("chunk ")]
    assert len(lines) == 8 and lines[1].endswith("accepted, warming up"), done.stderr


def test_a_known_class_that_is_no_known_model_is_told_at_once(project):
    (project / "pipeline" / "causal_inference.py").write_text("class CausalInferencePipeline: pass\n")
    (project / "other.py").write_text(
        "import sys\nfrom pipeline.causal_inference import CausalInferencePipeline as P\n"
        "P()\nprint('the work', file=sys.stderr)\n"
    )
    done = tokentrim(project, "--out", "log", "other.py")
    first, advice, *_ = done.stderr.splitlines()
    assert first.startswith("tokentrim run: CausalInferencePipeline is left unpatched. ") and "self-forcing: " in first
    assert "framepack" not in first and advice.startswith("Call tokentrim_hooks.patch"), "only who asked for it"
    assert done.stderr.index("left unpatched") < done.stderr.index("the work")


NESTED = """
from pathlib import Path
import torch
from tokentrim_hooks.reference.pipeline import ReferencePipeline

class Owner:
    def __init__(self):
        self.pipe = ReferencePipeline.random(grid=(2, 2))

class Heir(ReferencePipeline):
    def __init__(self):
        inner = ReferencePipeline.random(grid=(2, 2))
        Path("inside.txt").write_text(str(inner.is_patched))
        super().__init__(inner.generator)
        self.inner = [inner]

torch.manual_seed(0)
pipe = {made}
pipe.inference(torch.randn(1, 24, 3, 8, 8))
"""


@pytest.mark.parametrize("made", ["ReferencePipeline.random(grid=(2, 2))", "Owner().pipe", "Heir()", "Heir().inner[0]"])
def test_our_own_pipeline_is_patched_as_anybody_s(project, made):
    """Also one that is built within another's constructor: then the outermost object is asked first."""
    script = NESTED.replace("{made}", made).replace("inner.is_patched", "tokentrim.is_patched(inner)")
    (project / "own.py").write_text(f"import tokentrim_hooks as tokentrim\n{script}")
    done = tokentrim(project, "--out", "log", "--sensitivity", "0", "--quiet", "own.py")
    assert done.returncode == 0 and "left unpatched" not in done.stderr, done.stderr
    assert len(read_report(project / "log")) == 8 and not list(project.glob("log/model-*"))
    if "Heir" in made:
        assert (project / "inside.txt").read_text() == "False"


def test_of_nested_objects_the_outermost_is_asked_first(project):
    asked = []

    class Asked(Run):
        def _patch(self, instance):
            asked.append(type(instance).__name__)
            return "" if self.takes in asked else "no"

        def _refused(self, instance, words):
            asked.append(f"refused {type(instance).__name__}")

    class Inner:
        def __init__(self):
            pass

    class Base:
        def __init__(self):
            self.early = Inner()

    class Outer(Base):
        def __init__(self, fails=False):
            super().__init__()
            self.late = Inner()
            if fails:
                raise ValueError

    this = Asked(project)
    this.takes = "Outer"
    for kind in (Inner, Base, Outer):
        wrapt.wrap_function_wrapper(kind, "__init__", this._init)
    Outer()
    assert asked == ["Outer", "Inner", "Inner"]
    asked.clear()
    this.takes = "nobody"
    Outer()
    assert asked == ["Outer", "Inner", "Inner", "refused Outer", "refused Inner", "refused Inner"]
    asked.clear()
    with pytest.raises(ValueError):
        Outer(fails=True)
    assert asked == []
    Inner()
    assert asked == ["Inner", "refused Inner"], "nothing is left over of what failed"


def test_heirs_of_a_known_class_are_the_outermost_too(project):
    told, asked = [], []

    class Asked(Run):
        def _patch(self, instance):
            asked.append(type(instance).__name__)
            return ""

    class Known:
        def __init_subclass__(cls, label="none"):
            told.append((cls.__name__, label))

    this = Asked(project)
    this._wrap_class("Known", types.SimpleNamespace(Known=Known))

    class Heir(Known, label="given"):
        def __init__(self):
            self.inner = Known()

    class Grandchild(Heir):
        pass

    Heir(), Grandchild()
    assert told == [("Heir", "given"), ("Grandchild", "none")], "its own hook still runs"
    assert asked == ["Heir", "Known", "Grandchild", "Known"]
    this.stop()
    Grandchild()
    assert len(asked) == 4


def test_what_stands_behind_the_script_is_the_script_s(project):
    """Also where it looks like an option of ours, in full or abbreviated."""
    (project / "echo.py").write_text("import sys; print(sys.argv)")
    given = ["--o", "1", "--out", "2", "--observe", "--p=3", "-h", "--", "x"]
    done = tokentrim(project, "--out", "log", "echo.py", *given)
    assert done.stdout == f"{['echo.py', *given]}\n"
    assert not (project / "2").exists()


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
    done = tokentrim(project, "--out", "other", "--config", "run.toml", "--quiet", *flags, "inference.py", "video.pt")
    assert done.returncode == 0, done.stderr
    report = read_report(project / "other")
    assert report.triggers > 0 and report.settings["policy.sensitivity"] == 0
    assert {act["policy"] for record in report for act in record.acts} == {"CommitWindow"}


@pytest.mark.parametrize(
    ("flags", "file", "words"),
    [
        (["--policy", "drif"], "", "no policy named 'drif'; did you mean 'drift'. installed: adaptive, commit-window"),
        (["--policy", "commit-window", "--fraction", "0.2"], "", "fraction: options of the policy drift"),
        (["--policy", "commit-window"], "[policies.commit-window]\nframe = 1", "made so: .*'frame'"),
        (["--policy", "commit-window"], "[policies.commit-window]\nframes = -1", "made so: frames must be"),
        (["--policy", "commit-window", "--observe"], "", "CommitWindow would; leave one of them out"),
        ([], "policies = 3", "policies must be tables"),
    ],
)
def test_wrong_policies_are_refused_before_the_script_begins(project, flags, file, words):
    (project / "run.toml").write_text(file)
    done = tokentrim(project, "--config", "run.toml", *flags, "inference.py", "never.pt")
    assert done.returncode == 2 and re.search(words, done.stderr), done.stderr
    assert not (project / "never.pt").exists()
