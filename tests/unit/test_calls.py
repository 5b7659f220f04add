"""A call of the denoiser: its arguments bound by name, its latents exchanged for a replay, its phase told."""

import gc
import weakref

import pytest
import tiny_reference as tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.inspection import _signatures, bind
from tokentrim_hooks.testing import ForcedPolicy


def test_a_users_hook_that_changes_the_arguments_is_applied_once_to_a_replay():
    pipeline, seen = tiny.make(), []

    def halve(module, args, kwargs):
        return args, {**kwargs, "noisy_image_or_video": kwargs["noisy_image_or_video"] / 2}

    pipeline.generator.register_forward_pre_hook(halve, with_kwargs=True)
    pipeline.generator.model.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with tokentrim.patched(pipeline, ForcedPolicy({1: (1,)})):
        tiny.run(pipeline, chunks=2)
    judged, elsewhere, again, replay = seen[5:9]  # the second with other latents at some tokens: which rows are theirs?
    assert len(seen) == 13 and torch.equal(judged, again) and torch.equal(judged, replay)
    assert not torch.equal(judged, elsewhere)


def test_candidate_probe_judges_also_where_commits_are_known_by_their_timestep_only():
    pipeline = tiny.make()
    call = pipeline._call
    pipeline._call = lambda latents, *rest: call(latents.clone(), *rest)
    with tokentrim.patched(pipeline, probe="candidate") as handle:
        tiny.run(pipeline)
    assert [record.severity is not None for record in handle.report] == [False, True, True, True, True]


def test_latents_that_are_a_part_of_an_argument_cannot_be_exchanged_in_silence():
    noisy = torch.randn(1, 3, 2, 4, 4)
    adapter = tokentrim.patch(tiny.make()).adapter
    fresh = torch.zeros(1, 3, 2, 4, 4)
    args, kwargs = adapter.with_latents(tokentrim.Call(noisy, 0), (1, noisy), {"x": noisy, "y": 2}, fresh)
    assert args[1] is fresh and kwargs == {"x": fresh, "y": 2}
    with pytest.raises(tokentrim.UnsupportedProbeError, match="a part of an argument"):
        adapter.with_latents(tokentrim.Call(noisy[:, :2], 0), (1, noisy), {}, fresh)


def test_a_signature_is_looked_up_once_and_keeps_no_model_alive():
    module = torch.nn.Linear(2, 2)
    assert bind(module, (1,), {}) == bind(module, (), {"input": 1}) == {"input": 1}
    module.forward = lambda *args, **kwargs: args  # as accelerate and others do, on the instance
    assert bind(module, (1,), {}) == {"input": 1}, "its class says what it takes"
    assert torch.nn.Linear.forward in _signatures

    def denoise(input, scale=3):
        return input

    assert bind(denoise, (1,), {}) == {"input": 1, "scale": 3} and denoise in _signatures
    function, model = weakref.ref(denoise), weakref.ref(module)
    del denoise, module
    gc.collect()
    assert function() is None and model() is None
