"""Patched first and compiled then: the same pruned result, and no graph break of ours while nothing is dead.

``backend="eager"`` runs everything of torch.compile but the code generator: tracing, guards, graph breaks.
"""

from __future__ import annotations

import pytest
import skyreels_tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.testing import ForcedPolicy


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def reference():
    pipeline = ReferencePipeline.random(layers=1, grid=(2, 2))

    def run():
        torch.manual_seed(0)
        return pipeline.inference(torch.randn(1, 12, 3, 8, 8))

    return pipeline, pipeline.generator, run


def skyreels():
    pipeline = skyreels_tiny.pipeline()

    def run():
        return pipeline(**{**skyreels_tiny.settings(), "generator": torch.Generator().manual_seed(0)}).frames

    return pipeline, pipeline.transformer, run


EACH = [
    pytest.param(reference, marks=pytest.mark.checks("self-forcing", "compiled")),
    pytest.param(skyreels, marks=pytest.mark.checks("skyreels-v2", "compiled")),
]


def breaks(denoiser, run):
    """Reasons of the graph breaks in one run of the compiled denoiser."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    denoiser.compile(backend="eager")
    run()
    return set(torch._dynamo.utils.counters["graph_break"])


@pytest.mark.parametrize("make", EACH)
def test_compiled_after_patching_prunes_the_same(make):
    pipeline, denoiser, run = make()
    plain = run()
    with tokentrim.patched(pipeline, ForcedPolicy(at={2: [0]})) as handle:
        eager = run()
        assert handle.report.triggers == 1
    assert not torch.equal(plain, eager)
    with tokentrim.patched(pipeline, ForcedPolicy(at={2: [0]})) as handle:
        denoiser.compile(backend="eager")
        compiled = run()
        assert handle.report.triggers == 1
    assert (compiled - eager).abs().max() <= 1e-5


@pytest.mark.parametrize("make", EACH)
def test_observing_adds_no_graph_break(make):
    pipeline, denoiser, run = make()
    alone = breaks(denoiser, run)
    denoiser._compiled_call_impl = None
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle:
        patched = breaks(denoiser, run)
        assert len(handle.report) > 1
    assert patched <= alone
