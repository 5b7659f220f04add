"""A user's own class has the model, and a method of it makes several videos inline: none takes in another's calls.

Its frame is one and the same, as that of a pipeline is for one video; what the sampler renews between videos tells.
"""

from __future__ import annotations

import pytest
import tiny_reference
import torch
from test_the_samplers_frames import STEPS, call

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy, count_syncs

pytestmark = pytest.mark.filterwarnings("ignore:tokentrim recorded")
NOISE = torch.randn(1, 4, 3, 8, 8)


def zeroed(pipeline, noise):
    """The cache in place, and its indices."""
    for layer in pipeline.kv_cache1:
        for part in layer.values():
            part.zero_()
    return torch.randn_like(noise)


def set_back(pipeline, noise):
    """Indices by new tensors, as Self-Forcing sets them back."""
    pipeline._reset_caches(noise, 4)
    return torch.randn_like(noise)


def filled(pipeline, noise):
    """Indices in place."""
    for layer in pipeline.kv_cache1:
        layer["global_end_index"].fill_(0)
        layer["local_end_index"].fill_(0)
    return torch.randn_like(noise)


def same_noise(pipeline, noise):
    """Nothing: the rows of the video before are written over, and the noise is the same."""
    return noise


def nothing(pipeline, noise):
    """Nothing at all."""
    return torch.randn_like(noise)


RENEWS = (zeroed, set_back, filled, same_noise)
STOPS = ((1, 0), (2, 0), (4, 0), (3, 3, 0), (0, 1, 0))
# The same latents at the same step, with nothing renewed, are a second call of that step, as some samplers make one.
CASES = [
    pytest.param(renew, stops, id=f"{renew.__name__}-{stops}")
    for renew in RENEWS
    for stops in STOPS
    if renew is not same_noise or 1 not in stops
]
each = pytest.mark.parametrize("renew", RENEWS, ids=lambda renew: renew.__name__)


def latents_of(noise, chunk, number):
    """Of a chunk's call: noise, and then what was made of the predictions."""
    latents = noise[:, 2 * chunk : 2 * chunk + 2]
    return latents if number == 0 else torch.randn_like(latents)


class Studio:
    """Has the model, as a pipeline has, and a scheduler loop of its own."""

    def __init__(self):
        self.pipeline = tiny_reference.make()
        self.model = self.pipeline.generator
        self.pipeline._reset_caches(NOISE, 4)

    def videos(self, renew, stops):
        """Videos of two chunks; one that ``stops`` is left behind so many calls of its first chunk, 0 goes on."""
        noise = NOISE
        for stop in stops:
            noise = renew(self.pipeline, noise)
            left = False
            for chunk in range(2):
                for number, step in enumerate((*STEPS, 0.0)):
                    call(self.pipeline, latents_of(noise, chunk, number), step, chunk)
                    if number + 1 == stop:
                        left = True
                        break
                if left:
                    break

    def steps(self, renew, stops):
        """The same with a method for each call, that ends."""
        noise = NOISE
        for stop in stops:
            noise = renew(self.pipeline, noise)
            for number, (chunk, step) in enumerate((c, s) for c in range(2) for s in (*STEPS, 0.0)):
                self.step(latents_of(noise, chunk, number % 5), step, chunk)
                if number + 1 == stop:
                    break

    def step(self, latents, step, chunk):
        call(self.pipeline, latents, step, chunk)


def made(method, renew, stops, policy=None):
    """Calls of each video's first chunk, as recorded."""
    studio = Studio()
    with tokentrim.patched(studio.pipeline.generator, policy or tokentrim.ObservePolicy()) as handle:
        getattr(studio, method)(renew, stops)
    return [sum(record.phases.values()) for record in handle.report if not record.chunk]


@pytest.mark.parametrize("method", ("videos", "steps"))
@pytest.mark.parametrize(("renew", "stops"), CASES)
def test_no_video_takes_in_the_calls_of_another(renew, stops, method):
    assert made(method, renew, stops) == [stop or 5 for stop in stops]


@pytest.mark.parametrize("stops", ((0, 1, 0), (0, 4, 2, 0)), ids=str)
@pytest.mark.parametrize("method", ("videos", "steps"))
def test_a_method_that_has_made_two_videos_is_not_taken_at_its_word(method, stops):
    """With no sign at all: its frame has made a whole video before."""
    assert made(method, nothing, stops) == [stop or 5 for stop in stops]


@each
def test_the_video_behind_one_that_was_left_is_pruned_as_if_it_were_alone(renew):
    """What is pruned goes by chunks: one that was merged would be the second, and its commit a denoising call."""
    policy = ForcedPolicy({1: [0]})
    assert made("videos", renew, (2, 0), policy) == [2, 5]


@each
def test_whole_videos_cost_no_look_at_the_timestep(renew):
    """As before: whoever makes whole videos waits for nothing."""
    studio = Studio()
    with tokentrim.patched(studio.pipeline.generator, tokentrim.ObservePolicy()), count_syncs() as log:
        studio.videos(renew, (0,))
    assert not [event for event in log.ours if "pace.py" in event.place]


def test_a_dict_with_a_tensor_of_each_call_is_no_cache_of_another_video():
    """Of two calls at each step with the same latents (guidance on one cache), both are of one video.

    As where the dict is made for each call, of a tensor of all and one of its own, and lies where the last one lay.
    """
    pipeline, given = tiny_reference.make(), {"shared": torch.zeros(3)}
    pipeline._reset_caches(NOISE, 4)
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle, torch.no_grad():
        for number, step in enumerate((*STEPS, 0.0)):
            latents = latents_of(NOISE, 0, number)
            for _ in range(2):
                given["own"] = torch.randn(2)
                pipeline._call(latents, torch.full((1, 2), step), given, 0)
    assert [record.phases for record in handle.report] == [{"first": 1, "refine": 9}]
