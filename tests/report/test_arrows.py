"""Drawing a page from a log needs neither a model nor what patches one."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tokentrim_hooks"

# The package's face imports everything, so an empty one stands in for it: what is left are the arrows of the module.
SCRIPT = """
import importlib, sys, types
face = types.ModuleType("tokentrim_hooks")
face.__path__ = [sys.argv[1]]
sys.modules["tokentrim_hooks"] = face
importlib.import_module(sys.argv[2])
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("tokentrim_hooks.")}
print(*sorted(rooms))
"""


@pytest.mark.parametrize("module", ["page", "page.charts", "filmstrip", "record", "provenance", "observers"])
def test_a_page_is_drawn_without_the_patch(module):
    command = [sys.executable, "-c", SCRIPT, str(PACKAGE), f"tokentrim_hooks.report.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"errors", "extras", "markers", "metrics", "report"}
