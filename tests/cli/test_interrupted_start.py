"""Ctrl-C while the command is still being loaded: one line and status 130, by real signals at places of its imports."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SIGNAL_AT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.{handler})

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {place!r}:
            os.kill(os.getpid(), signal.SIGINT)

from {entry} import main
sys.meta_path.insert(0, Finder())
sys.exit(main())
"""
PLACES = ("tokentrim_hooks.cli.main", "click", "tokentrim_hooks.cli.script.run", "tokentrim_hooks.errors")


def entry() -> str:
    """The module that the installed command calls ``main`` of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["tokentrim"].partition(":")
    assert function == "main"
    return str(module)


def run(place: str, handler: str) -> subprocess.CompletedProcess[str]:
    """``tokentrim completion bash``, with a signal as a module is imported."""
    code = SIGNAL_AT.format(entry=entry(), place=place, handler=handler)
    return subprocess.run(
        [sys.executable, "-c", code, "completion", "bash"], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("place", PLACES)
def test_one_line_and_130(place: str) -> None:
    made = run(place, "default_int_handler")
    assert (made.returncode, made.stdout, made.stderr) == (130, "", "tokentrim: stopped by Ctrl-C.\n")


def test_a_background_job_that_ignores_it_goes_on() -> None:
    made = run("click", "SIG_IGN")
    assert made.returncode == 0 and "complete" in made.stdout and not made.stderr


def test_the_module_begins_there_too() -> None:
    """``python -m tokentrim_hooks``."""
    assert f"from {entry()} import main" in (ROOT / "tokentrim_hooks" / "__main__.py").read_text("utf-8")


def test_the_running_command_has_the_usual_handler() -> None:
    code = f"import signal\nfrom {entry()} import main\nassert main() == 0\nprint(signal.getsignal(signal.SIGINT))"
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    made = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=120, preexec_fn=heeding
    )
    assert "default_int_handler" in made.stdout
