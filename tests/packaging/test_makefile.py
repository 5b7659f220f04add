"""What make would do: a virtual environment that it did not make keeps its torch."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not shutil.which("make"), reason="NOT CHECKED: no make")
@pytest.mark.parametrize(
    ("there", "given", "used"),
    [
        ([], [], ".venv"),
        (["pyvenv.cfg"], [], ".venv-make"),  # somebody's own
        (["pyvenv.cfg", ".demo"], [], ".venv"),
        (["pyvenv.cfg", ".by-make"], [], ".venv"),  # its packages could not be installed at first
        (["pyvenv.cfg"], ["VENV=.venv"], ".venv"),  # as it is asked for
    ],
)
def test_somebody_s_own_environment_is_left_alone(there, given, used, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in there:
        (tmp_path / ".venv" / name).touch()
    command = ["make", "--no-print-directory", "-n", *given, "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{used}/bin/tokentrim demo"
