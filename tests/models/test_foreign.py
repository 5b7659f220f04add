"""Adapters against the real code of packages from PyPI, each in a process and a folder of its own.

``make test-models`` installs the packages (their dependencies must not be resolved) and runs this. Where a package is
not installed its suite is skipped as "not checked". The folder is third_party/ or $TOKENTRIM_THIRD_PARTY.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from record_checks import passed_on

HERE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("TOKENTRIM_THIRD_PARTY") or HERE.parents[1] / "third_party")

# Package, version that was read and run, its folder, and how many checks of its suite must pass.
PACKAGES = [("fastvideo", "0.2.1", "fv", 132), ("streamdiffusionv2", "0.1.1", "sd2", 45)]


@pytest.mark.slow
@pytest.mark.parametrize(("package", "version", "folder", "checks"), PACKAGES)
def test_foreign(
    package: str, version: str, folder: str, checks: int, tmp_path: Path, record_property: Any, request: Any
) -> None:
    """The package's suite passes in a process that sees this package and no other foreign one."""
    if not (ROOT / folder / f"{package}-{version}.dist-info").is_dir():
        pytest.skip(f"not checked against the real {package} {version}: run `make test-models`")
    done = _run_suite(package, ROOT / folder, tmp_path / "report.xml", passed_on(request.config))
    cases = list(ElementTree.parse(tmp_path / "report.xml").iter("testcase"))
    for case in cases:
        for found in case.iter("property"):
            record_property("figure", found.get("value"))
        for found in case.iter("skipped"):
            record_property("not checked", f"{package}: {case.get('name')}: {found.get('message')}")
    assert done.returncode == 0, done.stdout[-6000:]
    assert sum(not list(case.iter("skipped")) for case in cases) >= checks


def _run_suite(package: str, folder: Path, report: Path, record: list[str]) -> subprocess.CompletedProcess[str]:
    suite = HERE / f"{package}_suite"
    ours = (HERE.parents[1] / "tools", HERE.parent / "adapters")
    path = os.pathsep.join(str(entry) for entry in (folder, HERE, suite, *ours))
    options = ["-q", "-c", os.devnull, "--rootdir", str(HERE.parents[1]), "-p", "no:cacheprovider", *record]
    options += ["-o", "junit_family=xunit1", f"--junitxml={report}"]
    options += ["--confcutdir", str(suite)]  # conftest.py above needs our own folders
    command = [sys.executable, "-m", "pytest", *options, *map(str, sorted(suite.glob("suite_*.py")))]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=report.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=1800, check=False,
    )  # fmt: skip
