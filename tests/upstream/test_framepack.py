"""The original FramePack, its real transformer and sampler, in a process of their own (see framepack_script.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import folder_of
from record_checks import passed_on

from tokentrim_hooks.testing import AdapterConformance

pytestmark = pytest.mark.upstream

NAMES = [f"{name} {way}" for name in ("plain", "guided", "teacache") for way in ("forward", "inverted")]

KITS = ("TestForward", "TestBackward", "TestForwardWithTeaCache")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    folder = folder_of("FramePack")
    script = Path(__file__).with_name("framepack_script.py")
    run = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> list[ElementTree.Element]:
    """The cases of the conformance kit in framepack_kit.py."""
    folder_of("FramePack")
    here, report = Path(__file__).parent, tmp_path_factory.mktemp("kit") / "report.xml"
    folders = [here, here.parent / "adapters", here.parents[1] / "tools", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, folders))
    options = ["-q", "--noconftest", "-c", os.devnull, "--rootdir", str(here.parents[1]), "-p", "no:cacheprovider"]
    options += passed_on(pytestconfig)
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", str(here / "framepack_kit.py")]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=report.parent, env=environment)
    assert report.is_file(), (run.stdout + run.stderr)[-3000:]
    return list(ElementTree.parse(report).iter("testcase"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each of the kit, and each direction."""
    if "case" in metafunc.fixturenames:
        names = [name for name in dir(AdapterConformance) if name.startswith("test_")]
        metafunc.parametrize("case", [f"{kind}::{name}" for kind in KITS for name in names])


def test_what_observing_adds(kit: list[ElementTree.Element]) -> None:
    """In operations and host syncs, as framepack_kit.py counts them."""
    _passed(next(one for one in kit if one.get("name") == "test_what_observing_adds"))


def test_the_kit(kit: list[ElementTree.Element], case: str) -> None:
    """What was not checked is skipped in the kit's words."""
    kind, _, name = case.partition("::")
    _passed(next(one for one in kit if one.get("name") == name and one.get("classname", "").endswith(f".{kind}")))


def _passed(found: ElementTree.Element) -> None:
    for skipped in found.iter("skipped"):
        pytest.skip(str(skipped.get("message")))
    trouble = [str(fault.text) for tag in ("failure", "error") for fault in found.iter(tag)]
    assert not trouble, trouble[0][-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_observing_changes_nothing_and_sees_every_section(found: dict[str, Any], name: str) -> None:
    case = found[name]
    assert case["neutral"] and case["restored"]
    starts = [-3, -6, -9, -12] if "inverted" in name else [1, 4, 7, 10]
    assert case["records"] == [[start, {"first": 1, "refine": 3}, start == starts[0]] for start in starts]


@pytest.mark.parametrize("name", NAMES)
def test_pruning_equals_minus_infinity_from_the_start_of_the_section(
    found: dict[str, Any], name: str, record_property: Callable[[str, Any], None]
) -> None:
    case = found[name]
    record_property("exact", (f"FramePack, {name}", case["effect"], case["error"]))
    assert case["triggers"] == 1
    assert case["keys"] == [94, 90, 92]
    assert case["error"] < 1e-5 < 1e-3 < case["effect"]


@pytest.mark.parametrize("name", NAMES)
def test_hiding_equals_minus_infinity(
    found: dict[str, Any], name: str, record_property: Callable[[str, Any], None]
) -> None:
    case = found[name]
    record_property("exact", (f"FramePack, {name}, hidden", case["effect"], case["hidden"]))
    assert case["hidden"] < 1e-5 < 1e-3 < case["effect"]


@pytest.mark.parametrize("name", NAMES)
def test_pruned_content_cannot_be_read(found: dict[str, Any], name: str) -> None:
    assert found[name]["leak"]["forced"] == 0.0
    assert found[name]["leak"]["observed"] > 1e-3


def test_teacache_really_skipped_steps(found: dict[str, Any]) -> None:
    """Its middle steps run no block; first and last do."""
    assert found["teacache forward"]["attentions"] < found["plain forward"]["attentions"]


def test_refuses_a_teacache_that_was_not_started_anew(found: dict[str, Any]) -> None:
    assert "initialize_teacache() before each section" in found["late"]
