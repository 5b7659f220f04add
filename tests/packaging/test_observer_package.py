"""The example package of observers installs offline, is found, needs none of its libraries until one is asked for.

What it writes is checked by its own tests (``make test-observers``), which need the libraries.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "observers"
PACKAGES = {"rerun": "rerun-sdk", "tensorboard": "tensorboard", "wandb": "wandb"}
NAMES = tuple(PACKAGES)

SCRIPT = """
import sys

for library in ("rerun", "tensorboard", "wandb"):
    sys.modules[library] = None  # as if it were not installed

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference import ReferencePipeline

found = {info.name: info.distribution for info in tokentrim.installed_observers()}
pipeline = ReferencePipeline.random(grid=(2, 2))
for name in ("rerun", "tensorboard", "wandb"):
    assert found[name] == "tokentrim-observers 0.1.0", found
    try:
        tokentrim.patch(pipeline, observers=[name])
    except tokentrim.TokenTrimError as failure:
        print(name, tokentrim.is_patched(pipeline), *str(failure).splitlines())
"""


@pytest.fixture(scope="module")
def target(install):
    return install(EXAMPLE)


def test_without_its_library_an_observer_says_what_to_install(target):
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=target, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(NAMES)
    for name, line in zip(NAMES, lines, strict=True):
        assert line.startswith(f"{name} False the observer '{name}' needs {PACKAGES[name]}, which is not"), line
        assert line.endswith(f" Install it: pip install {PACKAGES[name]}"), line


def test_the_list_does_not_call_ready_what_lacks_its_library(target):
    code = SCRIPT.partition("import tokentrim_hooks as")[0] + (
        "from tokentrim_hooks.cli.main import main\n"
        "assert main(['adapters', '--json', '-']) == 0\n"
        "assert main(['run', '--observer', 'wandb', 'none.py']) == 2\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=target, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["name"]: (one["state"], one["why"]) for one in json.loads(done.stdout)["observers"]}
    for name in NAMES:
        assert found[name] == ("not installed", f"needs {PACKAGES[name]}: pip install {PACKAGES[name]}"), found
    assert found["thumbnails"] == ("ready", "") and "pip install wandb" in done.stderr


def test_each_observer_is_short():
    lengths = [len(path.read_text().splitlines()) for path in (EXAMPLE / "tokentrim_observers").glob("*.py")]
    assert len(lengths) == 5 and max(lengths) < 80
