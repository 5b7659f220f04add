"""A patch that comes off in the middle, or is put in the place of another, leaves nothing of itself behind."""

import pytest
import tiny_reference as tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.pruning.call_scope import BUSY, current_tap
from tokentrim_hooks.testing import ForcedPolicy


class Failing(ForcedPolicy):
    def judge(self, chunk, history):
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
    assert (BUSY.now, current_tap()) == (False, None)


def test_replacing_a_patch_that_cannot_be_replaced_leaves_it_on():
    pipeline = tiny.make()
    handle = tokentrim.patch(pipeline)
    pipeline.generator.compile(backend="eager")
    with pytest.raises(tokentrim.CompiledModelError):
        tokentrim.patch(pipeline, replace=True)
    assert handle.active and tokentrim.is_patched(pipeline)
