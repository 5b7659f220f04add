"""Accelerate's own hooks on the denoiser, before and after the patch."""

import pytest
import torch
from accelerate import hooks
from test_reference_conformance import Reference

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy, fingerprint

POLICY = ForcedPolicy({2: (1, 5)})


class Counting(hooks.ModelHook):
    """Does what offloading hooks do: runs before every forward."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.fixture
def model():
    return Reference().make_model()


@pytest.fixture
def expected():
    kit = Reference()
    model = kit.make_model()
    with tokentrim.patched(model, POLICY):
        return kit.run(model, 0)


@pytest.mark.parametrize("first", ["accelerate", "tokentrim"])
@pytest.mark.parametrize("last", ["accelerate", "tokentrim"])
def test_any_order(model, expected, first, last):
    kit = Reference()
    plain = kit.run(model, 0)
    before, hook, handle = fingerprint(model), Counting(), None
    if first == "tokentrim":
        handle = tokentrim.patch(model, POLICY)
    hooks.add_hook_to_module(model.generator, hook)
    handle = handle or tokentrim.patch(model, POLICY)
    assert torch.equal(kit.run(model, 0), expected)
    assert hook.calls == kit.chunks * 5 + 3, "two proofs and the regenerated call run accelerate's hook as well"
    if last == "accelerate":
        handle.unpatch()
        assert torch.equal(kit.run(model, 0), plain)
        hooks.remove_hook_from_module(model.generator)
    else:
        hooks.remove_hook_from_module(model.generator)
        assert torch.equal(kit.run(model, 0), expected)
        handle.unpatch()
    assert torch.equal(kit.run(model, 0), plain)
    # accelerate itself leaves `forward` on the instance
    own = {"ReferencePipeline.generator.forward"}
    lines = [line for line in before.differences(fingerprint(model)) if not any(place in line for place in own)]
    assert lines == []
