"""The original FramePack, its real transformer and sampler, in a process of their own (see framepack_script.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import folder_of

pytestmark = pytest.mark.upstream

NAMES = [f"{name} {way}" for name in ("plain", "guided", "teacache") for way in ("forward", "inverted")]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    folder = folder_of("FramePack")
    script = Path(__file__).with_name("framepack_script.py")
    run = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


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
