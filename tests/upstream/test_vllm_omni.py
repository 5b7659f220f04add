"""The vLLM-Omni plugin (examples/engines/vllm_omni) on its own LingBot-World transformer, cache, runner and loader.

$TOKENTRIM_VLLM_OMNI lists the folders, joined as in PYTHONPATH, in which vLLM-Omni 0.30.0, vLLM's Python part and what
they import are unpacked. All runs in a process of its own, which leaves what it found in a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import difference
from record_checks import OF_TEST

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parents[1] / "examples" / "engines" / "vllm_omni"
VARIABLE, CHUNK, DEAD, ROWS = "TOKENTRIM_VLLM_OMNI", 4, (0, 5, 11, 20), 4 * 2
PHASES = {"first": 1, "refine": 3, "commit": 1}
POINTS = "[vllm_omni.general_plugins]\ntokentrim = tokentrim_vllm_omni:register\n"

ADAPTER = "vllm-omni-lingbot"
Record = Callable[[str, Any], None]

pytestmark = [pytest.mark.upstream, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened, with a folder that makes the plugin look installed."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"not checked against the real vLLM-Omni: {VARIABLE} is not set")
    folder = tmp_path_factory.mktemp("vllm_omni")
    told = folder / "tokentrim_vllm_omni-0.1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: tokentrim-vllm-omni\nVersion: 0.1.0\n")
    (told / "entry_points.txt").write_text(POINTS, encoding="utf-8")
    assert 'tokentrim = "tokentrim_vllm_omni:register"' in (PLUGIN / "pyproject.toml").read_text(encoding="utf-8")
    paths = [str(HERE), str(PLUGIN), str(folder), *sys.path, os.environ[VARIABLE]]
    settings = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    policy = {"TOKENTRIM_VLLM_OMNI_POLICY": '{"sensitivity": 0.0, "warmup": 1}'}
    command = [sys.executable, str(HERE / "vllm_omni_scenarios.py"), str(folder)]
    environment = {**os.environ, **settings, **policy}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(torch.load(folder / "found", weights_only=False))


@pytest.mark.checks(ADAPTER, "exact")
@pytest.mark.parametrize("paged", [False, True], ids=["single request", "session"])
def test_prune_equals_masked_attention(found: dict[str, Any], paged: bool, record_property: Record) -> None:
    """Sessions with their own operator and plain code for pages, the reference with torch's kernel."""
    found = found["sessions"] if paged else found
    forced, effect = found["forced"], difference(found["masked"], found["plain"])
    error = difference(forced["video"], found["masked"])
    print(f"LingBot-World in vLLM-Omni, {'session' if paged else 'request'}: effect {effect:.2e} error {error:.1e}")
    record_property("exact", ("session" if paged else "request", effect, error))
    assert effect > 1e-2 and error <= 1e-5
    assert [dead for _, _, dead, _ in forced["records"]] == [ROWS if n == CHUNK else 0 for n in range(7)]
    assert forced["records"][CHUNK][1] == DEAD and [phases for *_, phases in forced["records"]] == [PHASES] * 7


@pytest.mark.checks(ADAPTER, "neutral")
@pytest.mark.parametrize("paged", [False, True], ids=["single request", "session"])
def test_observing_is_bit_identical(found: dict[str, Any], paged: bool) -> None:
    found = found["sessions"] if paged else found
    assert torch.equal(found["observed"]["video"], found["plain"])


@pytest.mark.checks(ADAPTER, "undone")
@pytest.mark.parametrize("paged", [False, True], ids=["single request", "session"])
def test_undone(found: dict[str, Any], paged: bool) -> None:
    found = found["sessions"] if paged else found
    assert torch.equal(found["forced"]["undone"], found["plain"])


def test_a_session_is_the_request_s_video(found: dict[str, Any]) -> None:
    """So the references of both are about one and the same."""
    sessions = found["sessions"]
    assert difference(sessions["plain"], found["plain"]) <= 1e-5
    assert difference(sessions["seen"], sessions["plain"]) <= 1e-5 and sessions["finite"]


@pytest.mark.checks(ADAPTER, "hide")
def test_whole_frames_are_left_out_of_the_table_of_pages(found: dict[str, Any]) -> None:
    """No row is copied: the kernel that reads pages is told of fewer."""
    sessions = found["sessions"]
    effect = difference(sessions["frames masked"], sessions["plain"])
    error = difference(sessions["frames"]["video"], sessions["frames masked"])
    print(f"whole frames hidden from a session's chunk: effect {effect:.2e} error {error:.1e}")
    assert effect > 1e-2 and error <= 1e-5 and sessions["gathered for frames"] == 0
    assert torch.equal(sessions["frames"]["undone"], sessions["plain"])
    assert difference(sessions["commit"]["video"], sessions["plain"]) > 1e-3


def test_sessions_that_share_a_pool_are_pruned_as_each_is_alone(found: dict[str, Any]) -> None:
    sessions = found["sessions"]
    for alone, together in zip(sessions["alone"], sessions["together"], strict=True):
        assert torch.equal(alone, together)
    assert sessions["pruned together"] == [CHUNK, CHUNK]
    assert torch.equal(sessions["alone"][0], sessions["forced"]["video"])


def test_vllm_omni_loads_the_plugin_and_imports_us_at_the_first_call(found: dict[str, Any]) -> None:
    plugin = found["plugin"]
    assert plugin["loaded"] == ["tokentrim"] and not plugin["early"]
    assert plugin["pruned"] and not torch.equal(plugin["video"], found["plain"])
    assert torch.equal(plugin["undone"], found["plain"]) and not plugin["patched"]


def test_the_way_for_cuda_is_exact_too(found: dict[str, Any]) -> None:
    """Its branch and its arguments, with vLLM-Omni's own reference in the place of the kernel, for there is no GPU."""
    pruned = found["on CUDA"]
    assert found["kernel"] > 100, "the kernel for pages was called"
    torch.testing.assert_close(pruned["video"], found["masked"], rtol=0, atol=1e-5)
    assert torch.equal(pruned["undone"], found["plain on CUDA"])


def test_other_caches_are_refused_in_words(found: dict[str, Any]) -> None:
    assert "cache of its own" in found["refusals"]["used"] and "16 rows" in found["refusals"]["pages"]


@pytest.mark.parametrize("kit", ["kit", "kit of sessions"])
def test_the_kit_finds_nothing_wrong(found: dict[str, Any], kit: str) -> None:
    assert not {name: why for name, why in found[kit].items() if not why.startswith("NOT CHECKED")}


@pytest.mark.parametrize("kit", ["kit", "kit of sessions"])
@pytest.mark.parametrize("test", OF_TEST)
def test_of_the_kit(found: dict[str, Any], kit: str, test: str, record_property: Record) -> None:
    """The kit's own tests, one by one, for the table in docs/models.md."""
    record_property("checks", (ADAPTER, f"tests/upstream/test_vllm_omni.py::{kit}", OF_TEST[test], test))
    why = found[kit].get(test, "")
    if why.startswith("NOT CHECKED"):
        pytest.skip(why)
    assert not why
