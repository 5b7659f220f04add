"""The SGLang plugin (examples/engines/sglang) on SGLang's own stage, transformer, cache, plugin loader and groups.

$TOKENTRIM_SGLANG lists the folders, joined as in PYTHONPATH, in which SGLang 0.5.23 and what it imports are unpacked.
All runs in processes of its own, which leave what they found in files.
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
from record_checks import OF_TEST

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parents[1] / "examples" / "engines" / "sglang"
VARIABLE, CHUNK, DEAD, ROWS = "TOKENTRIM_SGLANG", 4, (0, 5, 11, 20), 4 * 3
ADAPTER = "sglang"
Record = Callable[[str, Any], None]
PHASES = {"first": 1, "refine": 2, "commit": 1}
POINTS = "[sglang.multimodal_gen.plugins]\ntokentrim = tokentrim_sglang:register\n"

pytestmark = [pytest.mark.upstream, pytest.mark.slow]


def run_ranks(folder: Path, size: int) -> list[dict[str, Any]]:
    """Run ``size`` ranks; what each has found."""
    paths = [str(HERE), str(PLUGIN), str(folder), *sys.path, os.environ[VARIABLE]]
    settings = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    policy = {"TOKENTRIM_SGLANG_POLICY": '{"sensitivity": 0.0, "warmup": 1}'}
    command = [sys.executable, str(HERE / "sglang_scenarios.py"), str(folder)]
    environment = {**os.environ, **settings, **policy}
    ranks = [
        subprocess.Popen([*command, str(r), str(size)], env=environment, stderr=subprocess.PIPE, text=True)
        for r in range(size)
    ]
    try:
        said = [process.communicate(timeout=1800)[1][-3000:] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in ranks), said
    return [torch.load(folder / f"found.{size}.{rank}", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that makes the plugin look installed, for SGLang's loader to discover."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"not checked against the real SGLang: {VARIABLE} is not set")
    made = tmp_path_factory.mktemp("sglang")
    told = made / "tokentrim_sglang-0.1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: tokentrim-sglang\nVersion: 0.1.0\n", encoding="utf-8")
    (told / "entry_points.txt").write_text(POINTS, encoding="utf-8")
    assert 'tokentrim = "tokentrim_sglang:register"' in (PLUGIN / "pyproject.toml").read_text(encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_ranks(folder, 1)[0]


@pytest.mark.checks(ADAPTER, "exact")
def test_prune_equals_masked_attention(one: dict[str, Any], record_property: Record) -> None:
    forced = one["forced"]
    error = float((forced["video"] - one["masked"]).abs().max())
    effect = float((one["masked"] - one["plain"]).abs().max())
    print(f"SGLang causal Wan: effect {effect:.2e} error {error:.1e}")
    record_property("exact", ("SGLang causal Wan", effect, error))
    assert effect > 1e-2 and error <= 1e-5
    assert [dead for _, _, dead, _ in forced["records"]] == [ROWS if n == CHUNK else 0 for n in range(6)]
    assert [phases for *_, phases in forced["records"]] == [PHASES] * 6


@pytest.mark.checks(ADAPTER, "neutral")
def test_observing_is_bit_identical(one: dict[str, Any]) -> None:
    assert torch.equal(one["observed"]["video"], one["plain"])


@pytest.mark.checks(ADAPTER, "undone")
def test_undone(one: dict[str, Any]) -> None:
    assert torch.equal(one["forced"]["undone"], one["plain"])


def test_sglang_loads_the_plugin_and_imports_us_at_the_first_call(one: dict[str, Any]) -> None:
    plugin = one["plugin"]
    assert not plugin["early"] and [name.rpartition(".")[2] for name in plugin["hooked"]] == ["__call__"]
    assert plugin["pruned"] and not torch.equal(plugin["video"], one["plain"])
    assert torch.equal(plugin["undone"], one["plain"]) and not plugin["patched"]


def test_other_caches_are_refused_in_words(one: dict[str, Any]) -> None:
    said = one["refusals"]
    assert said["plain"] == ""
    assert "packed" in said["packed"] and "allow_growth" in said["grows"] and "pinned" in said["pinned"]


@pytest.mark.checks(ADAPTER, "ranks")
def test_two_ranks_with_half_of_the_heads_each(folder: Path, one: dict[str, Any]) -> None:
    """SGLang's own tensor parallelism over gloo: same marks and records on both, and the one process's video."""
    first, second = (found["forced"] for found in run_ranks(folder, 2))
    assert first["rows"] == second["rows"] == one["forced"]["rows"] and any(first["rows"])
    assert first["records"] == second["records"]
    assert first["records"][CHUNK][1:3] == (DEAD, ROWS) == one["forced"]["records"][CHUNK][1:3]
    assert torch.equal(first["video"], second["video"])
    torch.testing.assert_close(first["video"], one["forced"]["video"], rtol=0, atol=1e-4)


def test_the_kit_finds_nothing_wrong(one: dict[str, Any]) -> None:
    assert not {name: why for name, why in one["kit"].items() if not why.startswith("NOT CHECKED")}


@pytest.mark.parametrize("test", OF_TEST)
def test_of_the_kit(one: dict[str, Any], test: str, record_property: Record) -> None:
    """The kit's own tests, one by one, for the table in docs/models.md."""
    record_property("checks", (ADAPTER, "tests/upstream/test_sglang.py::kit", OF_TEST[test], test))
    why = one["kit"].get(test, "")
    if why.startswith("NOT CHECKED"):
        pytest.skip(why)
    assert not why
