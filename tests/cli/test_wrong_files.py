"""Files and names that are wrong in themselves: each is told in a sentence or two, before any work, with status 2."""

import pytest

from tokentrim_hooks.cli.main import main

FILES = {
    "ok.py": "print('it ran')\n",
    "package/__init__.py": "print('imported before its time')",
    "typo.toml": "[policies.drift]\nfracton = 0.1\n",
    "other.toml": "[policies.flowmo]\nsteps = 3\n",
    "leaves.py": "import sys\nsys.exit(3)\n",
    "makes.py": "def nothing(): pass\ndef wants(a): pass\n",
    "no.mp4": "not a video",
    "empty/chunks.jsonl": "",
    "cut/chunks.jsonl": '{"video": 0, "chu',
    "deep.toml": f"probe = {5000 * '['}",
    "list.json": "[]",
    "words.json": '{"subject_consistency": ["high"]}',
    "other.json": '{"loss": [0.1]}',
}
WRONG = {
    ("run", ""): "no such script: '', an empty name\nGive its path",
    ("run", "-m", ""): "no such module: '', an empty name\nRun it from",
    ("run", "-m", "ok.py"): "no such module: ok.py\nLeave -m out for a file",
    ("try", "-m", "ok.py"): "no such module: ok.py\nLeave -m out for a file",
    ("run", "-m", "package"): "the package package has no __main__ to run.\nName a module in it",
    ("run", "--config", "typo.toml", "ok.py"): "DriftPolicy has no option 'fracton' (did you mean 'fraction'?); known",
    ("try", "--config", "other.toml", "ok.py"): "FlowMo has no option 'steps' (did you mean 'step'?); known: ",
    ("run", "--config", "deep.toml", "ok.py"): "cannot read deep.toml: it is nested too deep.\nGive a TOML file",
    ("run", "--policy", "DriftPolicy", "ok.py"): "no policy named 'DriftPolicy'; did you mean 'drift'? installed",
    ("run", "--config", "package", "ok.py"): "cannot read package: Is a directory.\nGive a TOML file",
    ("run", "--out", "", "ok.py"): "'--out': the name is empty; give one",
    ("report", ""): "'FOLDER': the name is empty; give one",
    ("demo", "--out", ""): "'--out': the name is empty; give one",
    ("adapters", "--json", ""): "'--json': the name is empty; give one",
    ("report", "empty"): "empty/chunks.jsonl holds no chunk; see that",
    ("report", "cut"): "cut/chunks.jsonl holds no chunk; see that",
    ("report", "cut", "--video", "no.mp4"): "no.mp4 cannot be read as a video: Invalid data found when processing",
    ("report", "cut", "--what-if", "senstivity=3"): "has no option 'senstivity' (did you mean 'sensitivity'?)",
    ("detect", "leaves:model"): "cannot import leaves:model: SystemExit: 3 (",
    ("compare", "leaves:trial"): "cannot import leaves:trial: SystemExit: 3 (",
    ("detect", "makes:nothing"): "makes:nothing returns None, which is no model; return the model from it",
    ("detect", "makes:wants"): "wants() missing 1 required positional argument: 'a'.\nName a function",
    ("metrics", "--vbench", "list.json"): "it holds a list, not an object of dimensions.\nGive the",
    ("metrics", "--vbench", "words.json"): "subject_consistency has no list that begins with a score.\nGive the",
    ("metrics", "--vbench", "other.json"): "it has none of VBench's dimensions.\nGive the",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_and_what_to_do(arguments, tmp_path, monkeypatch, capsys):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert WRONG[arguments] in said.err, said.err
    assert not said.out and said.err.startswith("tokentrim") and len(said.err.splitlines()) <= 2
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.suffix not in ("", ".pyc")}
    assert written == set(FILES)
