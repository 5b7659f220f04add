"""The house: who imports whom, how many doors it has, how long a file may be. The contracts are in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tokentrim_hooks"
LONGEST = 300
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"

LONGER = {
    "tokentrim_hooks/adapter.py": "all that an adapter's author may override, in one place",
    "tokentrim_hooks/reference/model.py": "a whole model, and its cache",
}

UNDER_TYPE_CHECKING = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import tokentrim_hooks.adapter
"""

PLANTED = [
    ("layers", "rollout/state.py", "import tokentrim_hooks.handle"),
    ("layers", "policy/base.py", UNDER_TYPE_CHECKING),
    ("layers", "corridor.py", "in_no_layer = True"),
    ("acyclic", "pruning/context.py", "import tokentrim_hooks.pruning.tap"),
    ("policy", "policy/drift.py", "import tokentrim_hooks.pruning.context"),
    ("pruning", "pruning/context.py", "import tokentrim_hooks.policy.base"),
    ("report", "report/page/writing.py", "import tokentrim_hooks.patching.patches"),
    ("patching", "patching/patches.py", "import tokentrim_hooks.policy.base"),
    ("metrics", "metrics/metrics.py", "import tokentrim_hooks.report.record"),
    ("core", "rollout/state.py", "import tokentrim_hooks.reference.model"),
    ("reference", "reference/model.py", "import tokentrim_hooks.policy.base"),
    ("face", "rollout/state.py", "import tokentrim_hooks"),
    ("no-adapter", "plugins.py", "import tokentrim_hooks_adapters.causvid"),
    ("adapters", "../tokentrim_hooks_adapters/causvid.py", "import tokentrim_hooks.pruning.context"),
]
"""A contract, and an import that it has to forbid."""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of both packages, as they lie in a wheel, for planting."""
    pytest.importorskip("importlinter", reason="import-linter comes with the dev extra")
    folder = tmp_path_factory.mktemp("house")
    skipped = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(PACKAGE, folder / "tokentrim_hooks", ignore=skipped)
    shutil.copytree(ROOT / "adapters", folder / "tokentrim_hooks_adapters", ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(house, *options):
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(house), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, cwd=house, env=environment, timeout=120)


def test_contracts_are_kept(house):
    done = lint(house)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("contract", "file", "line"), PLANTED, ids=lambda value: value.strip().split("\n")[-1][:60])
def test_a_planted_import_is_found(house, contract, file, line):
    path = house / "tokentrim_hooks" / file
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        done = lint(house, "--contract", contract)
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_every_contract_is_seen_to_fail():
    contracts = re.findall(r'^id = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert sorted(contracts) == sorted({contract for contract, _, _ in PLANTED})


def test_few_modules_stand_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_files_are_short():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "adapters").glob("*.py")]
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in files}
    assert {name for name, length in lengths.items() if length > LONGEST} <= LONGER.keys()
