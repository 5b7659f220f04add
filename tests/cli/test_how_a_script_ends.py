"""The status of ``tokentrim run`` is the script's, whatever ends it; where no model was made it says so."""

import pytest

from tokentrim_hooks.cli.main import main
from tokentrim_hooks.cli.script import runner

ENDS = {
    "": 1,
    "raise SystemExit": 1,
    "raise SystemExit(0)": 1,
    "raise SystemExit(3)": 3,
    "raise SystemExit('in words')": 1,
    "raise KeyboardInterrupt": 130,
    "raise GeneratorExit": 1,
    "import asyncio\nraise asyncio.CancelledError": 1,
}
"""By what the script does: the status, 1 instead of 0 as no model was patched."""


@pytest.fixture
def status_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "constructors", list)  # wraps no class in the process of the tests

    def run(text, *options):
        (tmp_path / "script.py").write_text(f"{text}\n")
        try:
            return main(["run", *options, "script.py"])
        except SystemExit as end:
            return end.code

    return run


@pytest.mark.parametrize("text", ENDS)
def test_the_status_and_why_there_is_no_model(status_of, text, capsys):
    assert status_of(text) == ENDS[text]
    said = capsys.readouterr().err
    assert ("tokentrim_hooks" in said) == (text in ("", "raise SystemExit", "raise SystemExit(0)")), "no frame of ours"
    whole = "constructed no class" in said
    assert whole == (ENDS[text] == 1 and text in ("", "raise SystemExit", "raise SystemExit(0)"))
    assert ("the script was stopped before it made one" in said) == ("Keyboard" in text)


def test_unpatched_it_is_the_script_s_own(status_of):
    assert status_of("raise SystemExit(0)", "--unpatched") == status_of("", "--unpatched") == 0
