"""Marks on dead rows of a cache: found again and cleared wherever the cache is, and keeping nothing alive."""

import gc
import weakref

import pytest
import tiny_reference as tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.pruning.tombstones import Tombstones, Traces
from tokentrim_hooks.testing import ForcedPolicy


@pytest.mark.parametrize("persist", [True, False])
def test_unpatch_outside_of_the_inference_mode_in_which_the_caches_were_made(persist):
    pipeline = tiny.make()
    handle = tokentrim.patch(pipeline, ForcedPolicy({2: (1,), 4: (2,)}, persist=persist))
    with torch.inference_mode():
        tiny.run(pipeline)
    handle.unpatch()
    assert not tokentrim.is_patched(pipeline)
    assert all(torch.isfinite(layer["v"]).all() for layer in pipeline.kv_cache1)


def test_marks_are_revived_outside_of_inference_mode():
    with torch.inference_mode():
        values = torch.randn(1, 4, 1, 2)
        before, marks = values.clone(), Tombstones()
        marks.mark(tokentrim.CacheRows([values], 0, 4, 2), [[1]])
    marks.revive()
    assert torch.equal(values, before)


@pytest.mark.parametrize("inference", [True, False])
def test_marks_are_found_again_through_views(inference):
    """An adapter may hand out a view of V that nobody keeps (transformers' heads-first layers)."""
    with torch.inference_mode(inference):
        cache = torch.zeros(1, 2, 4, 3)
        traces = Traces.of([cache.transpose(1, 2)])
        cache[0, 0, 1, 0] = float("inf")
    assert not traces.lost
    traces.clear()
    assert torch.isfinite(cache).all()
    del cache
    gc.collect()
    assert traces.lost, "traces keep no memory alive"


def test_marks_are_cleared_from_a_cache_whose_tensors_are_made_anew():
    """Concatenating caches copy their marks along; whoever unpatches must find them where they are now."""
    pipeline = tiny.make()

    def renew(module, args, kwargs, output):
        for layer in kwargs["kv_cache"]:
            layer["v"] = layer["v"].clone()

    pipeline.generator.register_forward_hook(renew, with_kwargs=True)
    handle = tokentrim.patch(pipeline, ForcedPolicy({2: (1,)}))
    tiny.run(pipeline, chunks=4)
    assert not all(torch.isfinite(layer["v"]).all() for layer in pipeline.kv_cache1)
    handle.unpatch()
    assert all(torch.isfinite(layer["v"]).all() for layer in pipeline.kv_cache1)


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_a_cache_that_the_sampler_drops_is_freed_after_a_prune_in_the_last_chunk(probe):
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, ForcedPolicy({3: (1,)}), probe=probe) as handle:
        tiny.run(pipeline, chunks=4)
        assert handle.report.triggers == 1
        values = [weakref.ref(layer["v"]) for layer in pipeline.kv_cache1]
        pipeline.kv_cache1 = None
        gc.collect()
        assert [value() for value in values] == [None, None]
