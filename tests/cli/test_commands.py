"""The command line as such: help, version, completion, suggestions, JSON, status, and a sentence for each mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokentrim_hooks import errors
from tokentrim_hooks.cli.main import COMMANDS, main
from tokentrim_hooks.cli.script.options import NUMBERS
from tokentrim_hooks.console import plain_table
from tokentrim_hooks.policy.token_trim import DriftPolicy


def test_bare_tokentrim_shows_the_help(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare and all(f"\n  {name} " in bare for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"Usage: tokentrim {name}" in capsys.readouterr().out


def test_no_help_waits_for_torch():
    """A second and more; nor for anything else that a help has no use for."""
    code = f"""
import contextlib, io, sys
from tokentrim_hooks.cli.main import main
from tokentrim_hooks.console import plain_table
with contextlib.redirect_stdout(io.StringIO()):
    for arguments in ([], ["--version"], *([name, "--help"] for name in {list(COMMANDS)!r}), ["completion", "bash"]):
        assert main(arguments) == 0
with contextlib.redirect_stderr(io.StringIO()):
    assert main(["adapers"]) == 2
print(sorted({{"torch", "numpy", "tabulate", "pluggy", "wrapt", "jinja2"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[]\n", done.stderr


def test_defaults_in_words_are_the_policy_s():
    told = {name: re.search(r"; (\d\S*?)[.,](?: |$)", words)[1] for name, (_, words) in NUMBERS.items()}
    assert told == {name: str(getattr(DriftPolicy(), name)) for name in NUMBERS}


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"tokentrim, version \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_completion_is_what_the_shell_sources(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "_TOKENTRIM_COMPLETE=" in capsys.readouterr().out


def test_completion_completes():
    code = "import sys; from tokentrim_hooks.cli.main import main; sys.exit(main())"
    words = {"_TOKENTRIM_COMPLETE": "bash_complete", "COMP_WORDS": "tokentrim run --obs", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["plain,--observe", "plain,--observer"], done.stderr


WRONG = {
    ("adapers",): "no such command 'adapers'; did you mean 'adapters'?",
    ("nonsense",): "no such command 'nonsense'",
    ("--versoin",): "Did you mean",  # in the words of the click that is installed
    ("run", "--polcy", "drift", "x.py"): "Did you mean",  # in the words of the click that is installed
    ("demo", "--seeds", "0"): "'--seeds': must be at least 1, got 0",
    ("demo", "--chunks", "1"): "'--chunks': must be at least 2, got 1",  # a half to compare with the other
    ("compare", "--seeds", "0"): "'--seeds': must be at least 1, got 0",
    ("metrics", "--period", "0", __file__): "'--period': must be at least 1, got 0",
    ("metrics", "no.mp4"): "'no.mp4' does not exist",
    ("metrics", "."): "'.' is a directory",
    ("metrics",): "give at least one video, or --vbench with a result file",
    ("detect",): "Missing argument 'PACKAGE.MODULE:FACTORY'",
    ("run",): "Missing argument 'SCRIPT'",
    ("run", "none.py"): "no such script: none.py",
    ("run", "-m", "no.such.module"): "no such module: no.such.module",
    ("run", "--config", "none.toml", __file__): "cannot read none.toml: ",
    ("run", "--policy", "drif", __file__): "no policy named 'drif'; did you mean 'drift'?",
    ("run", "--observer", "thumbnail", __file__): "no observer named 'thumbnail'; did you mean 'thumbnails'?",
    ("run", "--seed", str(10**20), __file__): "not in the range",
    ("try",): "Missing argument 'SCRIPT'",
    ("try", "none.py"): "no such script: none.py",
    ("try", "."): "no such script: .",
    ("try", "-m", "no.such.module"): "no such module: no.such.module",
    ("try", "--config", "none.toml", __file__): "cannot read none.toml: ",
    ("try", "--policy", "drif", __file__): "no policy named 'drif'; did you mean 'drift'?",
    ("try", "--pairs", "0", __file__): "'--pairs': must be at least 1, got 0",
    ("try", "--video", "/", __file__): "--video '/' is no pattern of paths",
    ("try", "--video", "out/**x", __file__): "--video 'out/**x' is no pattern of paths",
    ("try", "--out", f"{__file__}/x", __file__): f"cannot make the folder {__file__}/x: Not a directory",
    ("compare",): "give either MODULE:FUNCTION or --reference",
    ("compare", "--reference", "melting"): "no kind of drift 'melting'; there are fading, burning,",
    ("compare", "math:sqrt"): "math:sqrt makes no trial of the seeds [1, 2, 3, 4, 5, 6, 7, 8]: TypeError: ",
    ("compare", "builtins:len"): "builtins:len makes int, which has no model, columns, run, measure",
    ("compare", "--reference", "--seeds", str(10**9)): "'--seeds': must be at most 1000000, got 1000000000",
    ("compare", "--reference", "--threads", "100000"): "'--threads': must be at most 1024, got 100000",
    ("bench", "--dead", "nan"): "'--dead': 'nan' is no number between 0 and 1",
    ("bench", "--rounds", str(10**30)): "'--rounds': must be at most 1000000",
    ("compare", "no_such_package:make"): "No module named 'no_such_package'",
    ("run", "--policy", "drift", "--policy", "adaptive", __file__): "two policies judge a chunk, DriftPolicy and",
    ("run", "--fraction", "2", __file__): "the policy drift cannot be made so: fraction must be in (0, 1]",
    ("run", "--out", f"{__file__}/x", __file__): f"cannot make the folder {__file__}/x: Not a directory",
    ("demo", "--out", f"{__file__}/x"): f"cannot make the folder {__file__}/x: Not a directory",
    ("demo", "--out", "/proc/x"): "cannot make the folder /proc/x: No such file or directory",
    ("compare", "--reference", "--untrained", "--out", "/proc/x"): "cannot make the folder /proc/x",
    ("metrics", "--json", "/proc/x.json", __file__): "cannot write /proc/x.json",
    ("adapters", "--json", f"{__file__}/x"): "cannot make the folder",
    ("bench", "--json", "/proc/x.json"): "cannot write /proc/x.json",
    ("demo", "--device", "cuda:77"): "there is no device 'cuda:77' here",
    ("demo", "--device", "meta"): "there is no device 'meta' here",
    ("bench", "--device", "nonsense"): "there is no device 'nonsense' here",
    ("compare", "--reference", "--device", "cuda:77"): "there is no device 'cuda:77' here",
    ("report", "none"): "no such folder: none",
    ("report", ".", "--unpatched", "x.mp4"): "--unpatched needs --video",
    ("detect", "torch.nn"): "must read package.module:factory",
    ("detect", "no_such_package:x"): "No module named 'no_such_package'",
    ("detect", "torch.nn:Nothing"): "cannot import torch.nn:Nothing",
    ("detect", "torch.nn:Linear"): "torch.nn:Linear cannot be called without arguments: TypeError",
    ("detect", "sys:exit"): "sys:exit cannot be called without arguments: SystemExit",
    ("completion",): "Missing argument '{bash|fish|zsh}'. Choose from: bash, fish, zsh",
    ("completion", "cmd"): "'cmd' is not one of 'bash', 'fish', 'zsh'",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_mistake_is_told_in_a_sentence_before_any_work(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert WRONG[arguments] in said.err, said.err
    assert not said.out and said.err.startswith("tokentrim") and len(said.err.splitlines()) <= 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing was written"


def test_a_full_disk_and_the_like_are_told_in_a_sentence(monkeypatch, capsys):
    def fails(*_):
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("tokentrim_hooks.api.adapters", fails)
    assert main(["adapters"]) == 2
    assert capsys.readouterr().err.startswith("tokentrim adapters: runs/x: No space left on device.\n")


def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokentrim_hooks.api.adapters", interrupted)
    assert main(["adapters"]) == 130
    said = capsys.readouterr().err
    assert said.strip() == "tokentrim adapters: stopped by Ctrl-C."


@pytest.mark.parametrize("device", ["-", "out.json"])
@pytest.mark.parametrize("name", ["adapters", "policies", "detect"])
def test_json(name, device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = ["tokentrim_hooks.reference.pipeline:ReferencePipeline.random"] if name == "detect" else []
    assert main([name, *target, "--json", device]) == 0
    said = capsys.readouterr().out
    found = json.loads(said if device == "-" else (tmp_path / device).read_text())
    assert (device == "-") != ("self-forcing  " in said or "CommitWindow" in said or "commit-window  " in said)
    if name == "detect":
        assert [item["adapter"] for item in found if item["matches"]] == ["self-forcing"] == [found[0]["adapter"]]
    else:
        names = {item["name"]: item for item in found[name]}
        assert names.keys() >= ({"self-forcing", "framepack"} if name == "adapters" else {"drift", "commit-window"})


def test_json_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "place").mkdir()
    (tmp_path / "link.json").symlink_to("place/old.json")
    assert main(["policies", "--json", "link.json"]) == 0
    whole = (tmp_path / "place" / "old.json").read_text()
    assert json.loads(whole) and (tmp_path / "link.json").is_symlink(), "written through, as the user named it"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["policies", "--json", "link.json"]) == 2
    assert (tmp_path / "place" / "old.json").read_text() == whole and len(list(tmp_path.rglob("*.*"))) == 2, "no draft"


def test_a_table_fits_a_narrow_terminal(monkeypatch):
    words = [["name", "word " * 40]]
    wide = plain_table(["a", "b"], words)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, plain_table(["a", "b"], words).splitlines())) <= 60 < max(map(len, wide.splitlines())) <= 110


def test_adapters_lists_them(capsys):
    assert main(["adapters"]) == 0
    assert "self-forcing" in capsys.readouterr().out


def test_detect_shows_the_yes_first_and_every_reason(capsys):
    target = "tokentrim_hooks.reference.pipeline:ReferencePipeline.random"
    assert main(["detect", target]) == 0
    head, _, first, *others = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["adapter", "recognised"] and re.match(r"self-forcing\s+yes\s", first)
    assert len(others) > 10 and not any(re.search(r"\syes\s", line) for line in others)
    assert main(["detect", "torch.nn:Identity"]) == 1
    assert not re.search(r"\byes\b", capsys.readouterr().out)


def test_detect_takes_a_module_of_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_model_for_detect.py").write_text("import torch\nmodel = torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert main(["detect", "my_model_for_detect:model"]) == 1, "a module is callable, but it is the model itself"


def test_detect_says_where_the_user_s_code_failed(tmp_path, monkeypatch, capsys):
    (tmp_path / "fails_for_detect.py").write_text("def make():\n    return {}['weights']\n")
    monkeypatch.chdir(tmp_path)
    assert main(["detect", "fails_for_detect:make"]) == 2
    assert "KeyError: 'weights' (" in (said := capsys.readouterr().err) and "fails_for_detect.py:2)" in said


def test_errors_are_all_exported():
    import tokentrim_hooks as tokentrim

    assert {name for name in vars(errors) if name.endswith(("Error", "Warning"))} <= set(tokentrim.__all__)
