"""An observer that runs the model which it observes is refused; the video that is being made is not ended by it."""

import pytest
import tiny_reference as tiny
import torch
from own_loop import calls, last

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})


class Runs:
    """Makes a video in the middle of another."""

    def __init__(self, pipeline):
        self.pipeline, self.told = pipeline, 0

    def on_chunk(self, records, latents):
        self.told += 1
        last(calls(self.pipeline, 7))


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_it_is_refused_and_left_out(on_error):
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        right, records = last(calls(pipeline, 1)), len(handle.report)
    observer = Runs(pipeline)
    said = pytest.warns(tokentrim.TokenTrimWarning, match=r"observer Runs failed.*SessionError.*runs the model that it")
    with said, tokentrim.patched(pipeline, POLICY, observers=[observer], on_error=on_error) as handle:
        assert torch.equal(last(calls(pipeline, 1)), right) and handle.active
        assert len(handle.report) == records and {record.video for record in handle.report} == {0}
    assert observer.told == 1


def test_another_model_may_be_run():
    pipeline, other = tiny.make(), tiny.make()
    with tokentrim.patched(pipeline, POLICY):
        right = last(calls(pipeline, 1))
    observer = Runs(other)
    with tokentrim.patched(other, POLICY), tokentrim.patched(pipeline, POLICY, observers=[observer]):
        assert torch.equal(last(calls(pipeline, 1)), right)
    assert observer.told == 5


@pytest.mark.parametrize("given", [None, 3, "notes"])
def test_observers_are_a_list(given):
    with pytest.raises(TypeError, match=r"observers must be a list.*got "):
        tokentrim.patch(tiny.make(), observers=given)


def test_a_batch_of_nothing_is_told_as_such():
    pipeline = tiny.make()
    noise = torch.zeros(0, 3, 3, 8, 8)
    with tokentrim.patched(pipeline), pytest.raises(tokentrim.LatentsError, match="batch of 0"):
        pipeline.generator(
            noisy_image_or_video=noise,
            conditional_dict={"prompt_embeds": None},
            timestep=torch.zeros(0, 3),
            kv_cache=pipeline._initialize_kv_cache(1, noise.dtype, noise.device, 96) or pipeline.kv_cache1,
            current_start=0,
        )
