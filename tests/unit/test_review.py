"""Defects found by reading the core against its guarantees; each of these failed before its mending."""

import gc
import weakref

import pytest
import tiny_reference as tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.patching.tap_site import depth_hooks
from tokentrim_hooks.pruning.key_selection import Ledger
from tokentrim_hooks.pruning.tap import BUSY, CallTap, current_tap, enter_tap, leave_tap
from tokentrim_hooks.pruning.tombstones import Tombstones
from tokentrim_hooks.report.record import read_report
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
        from tokentrim_hooks.pruning.tombstones import Traces

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


class Failing(ForcedPolicy):
    def judge(self, drift, history):
        raise ZeroDivisionError


def test_patching_again_after_tokentrim_stepped_aside():
    pipeline = tiny.make()
    old = tokentrim.patch(pipeline, Failing(), on_error="warn")
    with pytest.warns(tokentrim.TokenTrimWarning, match="stepped aside"):
        tiny.run(pipeline)
    new = tokentrim.patch(pipeline)
    old.unpatch()
    assert tokentrim.is_patched(pipeline) and len(pipeline.generator._forward_pre_hooks) == 1
    new.unpatch()
    assert not hasattr(pipeline, "_tokentrim_handle")


def test_unpatch_by_an_observer_in_mid_call_leaves_no_tap_behind():
    pipeline, handles = tiny.make(), []

    class Stopper:
        def on_chunk(self, records, latents):
            if records[0].pruned:
                handles[0].unpatch()

    handles.append(tokentrim.patch(pipeline, ForcedPolicy({2: (1,)}), observers=[Stopper()]))
    video = tiny.run(pipeline)
    assert torch.isfinite(video).all() and not tokentrim.is_patched(pipeline)
    assert (BUSY.taps, BUSY.now, current_tap()) == (0, False, None)


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


def test_a_users_hook_that_changes_the_arguments_is_applied_once_to_a_replay():
    pipeline, seen = tiny.make(), []

    def halve(module, args, kwargs):
        return args, {**kwargs, "noisy_image_or_video": kwargs["noisy_image_or_video"] / 2}

    pipeline.generator.register_forward_pre_hook(halve, with_kwargs=True)
    pipeline.generator.model.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with tokentrim.patched(pipeline, ForcedPolicy({1: (1,)})):
        tiny.run(pipeline, chunks=2)
    assert len(seen) == 11 and torch.equal(seen[5], seen[6])


def test_depth_is_not_counted_while_only_another_thread_has_dead_tokens():
    """BUSY tells of the whole process and may change between the two hooks; the depth belongs to one thread."""
    from tokentrim_hooks.patching.tap_site import _inside

    go_inside, go_outside = depth_hooks()
    BUSY.change(1)
    try:
        go_inside(None, (), {})
    finally:
        BUSY.change(-1)
    go_outside(None, (), {}, None)
    assert _inside.get() == 0


def test_candidate_probe_judges_also_where_commits_are_known_by_their_timestep_only():
    pipeline = tiny.make()
    call = pipeline._call
    pipeline._call = lambda latents, *rest: call(latents.clone(), *rest)
    with tokentrim.patched(pipeline, probe="candidate") as handle:
        tiny.run(pipeline)
    assert [record.severity is not None for record in handle.report] == [False, True, True, True, True]


def test_a_new_video_after_a_failure_in_the_very_first_chunk():
    pipeline = tiny.make()

    def fail(module, args):
        raise MemoryError

    with tokentrim.patched(pipeline) as handle:
        trap = pipeline.generator.model.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            tiny.run(pipeline)
        trap.remove()
        tiny.run(pipeline, batch=2)
        assert [r.chunk for r in handle.report if r.video == 1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_tap_that_somebody_wrapped_and_everybody_left_stays_inert_under_a_new_one():
    import types

    from tokentrim_hooks.patching.patches import Patches

    home = types.ModuleType("home")
    home.attention = lambda q, k, v: v
    first = Patches()
    first.tap(home, "attention")
    below = home.attention
    home.attention = lambda q, k, v: below(q, k, v)
    first.undo()
    second = Patches()
    second.tap(home, "attention")
    tap = CallTap(None, Ledger())
    token = enter_tap(tap)
    try:
        values = torch.zeros(1, 4, 1, 1)
        values[0, 2] = float("inf")
        assert home.attention(values, values, values).shape[1] == 3
    finally:
        leave_tap(token)
        second.undo()
    assert tap.calls == 1


def test_a_log_that_a_crash_cut_off_can_be_continued(tmp_path):
    record = tokentrim.ChunkRecord(0, 0, 0, 0, 1, {})
    (tmp_path / "chunks.jsonl").write_text(record.as_json() + '\n{"video": 0, "chu')
    log = tokentrim.JsonLines(tmp_path, append=True)
    log.on_chunk([record], torch.zeros(1))
    log.on_end()
    assert len(read_report(tmp_path)) == 2


def test_latents_that_are_a_part_of_an_argument_cannot_be_exchanged_in_silence():
    noisy = torch.randn(1, 3, 2, 4, 4)
    adapter = tokentrim.patch(tiny.make()).adapter
    fresh = torch.zeros(1, 3, 2, 4, 4)
    args, kwargs = adapter.with_latents(tokentrim.Call(noisy, 0), (1, noisy), {"x": noisy, "y": 2}, fresh)
    assert args[1] is fresh and kwargs == {"x": fresh, "y": 2}
    with pytest.raises(tokentrim.UnsupportedProbeError, match="a part of an argument"):
        adapter.with_latents(tokentrim.Call(noisy[:, :2], 0), (1, noisy), {}, fresh)


def test_replacing_a_patch_that_cannot_be_replaced_leaves_it_on():
    pipeline = tiny.make()
    handle = tokentrim.patch(pipeline)
    pipeline.generator.compile(backend="eager")
    with pytest.raises(tokentrim.CompiledModelError):
        tokentrim.patch(pipeline, replace=True)
    assert handle.active and tokentrim.is_patched(pipeline)


def test_one_call_keeps_an_index_for_each_device():
    """Layers of one model may lie on several devices; "meta" stands for the second one."""
    keys = torch.zeros(1, 3, 1, 2)
    keys[0, 1, 0, 0] = float("inf")
    tap = CallTap(None, Ledger())
    tap.attend(lambda q, k, v, mask: v, keys, keys, keys, None)
    assert [place[1].type for place in tap._keeps] == ["cpu"]
    with pytest.raises((NotImplementedError, RuntimeError)):  # it asks that device for its own marks
        tap.attend(lambda q, k, v, mask: v, *[keys.to("meta")] * 3, None)


def test_a_signature_is_looked_up_once_and_keeps_no_model_alive():
    from tokentrim_hooks.adapter import _signatures, bind

    module = torch.nn.Linear(2, 2)
    assert bind(module, (1,), {}) == bind(module, (), {"input": 1}) == {"input": 1}
    module.forward = lambda input, scale=3: input  # as accelerate and others do, on the instance
    assert bind(module, (1,), {}) == {"input": 1, "scale": 3}
    function, model = weakref.ref(module.forward), weakref.ref(module)
    assert function() in _signatures
    del module
    gc.collect()
    assert function() is None and model() is None
