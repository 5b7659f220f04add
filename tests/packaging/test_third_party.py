"""The example package installs offline, is found by its entry point, and passes its own conformance test."""

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_adapter"

SCRIPT = """
import torch
import tokentrim_hooks as tokentrim
from ribbon import RibbonVideo
from tokentrim_hooks.testing import ForcedPolicy

info = {i.name: i for i in tokentrim.adapters()}["ribbon"]
assert info.distribution == "ribbon-tokentrim 0.1.0", info
assert [d.adapter for d in tokentrim.detect(RibbonVideo()) if d.matches] == ["ribbon"]
pipeline, noise = RibbonVideo(), torch.randn(1, 10, 4, 8, 8)
with tokentrim.patched(pipeline, ForcedPolicy({2: 0.25})) as handle:
    video = pipeline.generate(noise)
print(handle.report.triggers, sum(r.dead for r in handle.report), bool(torch.isfinite(video).all()))
"""


@pytest.fixture(scope="module")
def target(install):
    return install(EXAMPLE)


def test_found_and_used_through_entry_points(python, target):
    assert python(target, "-c", SCRIPT).split() == ["1", "16", "True"]


def test_its_own_conformance_test_passes(python, target):
    test = str(EXAMPLE / "tests" / "test_conformance.py")
    out = python(target, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "-rs", test)
    assert "passed" in out and "failed" not in out
    kinds = "anchors, weights, guides, corrections and rewritten rows"
    words = f"{kinds}, which Ribbon has or takes none of, go unchecked: {out}"
    assert out.count("NOT CHECKED") == 5, words


def test_the_adapter_is_short():
    assert len((EXAMPLE / "ribbon_tokentrim.py").read_text().splitlines()) < 80
