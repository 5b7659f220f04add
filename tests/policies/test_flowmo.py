"""FlowMo moves a first chunk's latents as a calculation by hand does, with torch's own optimisers."""

from dataclasses import dataclass

import pytest
import torch
from by_hand import PIXELS
from guiding import expected_video, moved_by_hand, pipe, video

import tokentrim_hooks as tokentrim
from tokentrim_hooks import FlowMo

POLICIES = [
    FlowMo(),
    FlowMo(step=0.05, of="x0"),
    FlowMo(step=0.001, iterations=3),
    FlowMo(step=2.0, optimiser="descent"),
    FlowMo(step=1.0, optimiser="descent", iterations=2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_flowmo_equals_a_calculation_by_hand(policy):
    pipeline, plain = pipe(), video(pipe())
    with tokentrim.patched(pipeline, policy) as handle:
        got = video(pipeline)
    expected = expected_video(policy)
    assert (expected - plain).abs().max() > 2e-5
    assert torch.allclose(got, expected, atol=1e-9)
    acts = [(record.chunk, *act.items()) for record in handle.report for act in record.acts]
    assert {act[0] for act in acts} == {0} and all(dict(act[1:])["hook"] == "guide" for act in acts)
    assert torch.equal(video(pipeline), plain)


def test_the_band_says_which_calls_are_guided():
    policy = FlowMo(noise_band=0.7, step=0.05)
    pipeline = pipe()
    with tokentrim.patched(pipeline, policy) as handle:
        got = video(pipeline)
    assert torch.allclose(got, expected_video(policy, steps=(0, 1)), atol=1e-9)
    assert handle.report.records[0].acts[0]["calls"] == 2
    with tokentrim.patched(pipeline, FlowMo(noise_band=1.0, step=0.05)) as handle:
        video(pipeline)
    assert handle.report.records[0].acts[0]["calls"] == 1


def test_one_step_of_adam_moves_every_element_by_the_step():
    pipeline, seen = pipe(), []

    @dataclass(frozen=True)
    class Keeps(FlowMo):
        """Keeps what it answers."""

        def guide(self, chunk):
            answer = super().guide(chunk)
            seen.extend([] if answer is None else [(answer - chunk.latents).abs()])
            return answer

    with tokentrim.patched(pipeline, Keeps()):
        video(pipeline)
    assert len(seen) == 1 and float((seen[0] - 0.005).abs().median()) < 1e-5 and float(seen[0].max()) < 0.0051


def test_each_sample_is_guided_as_if_it_were_alone():
    pipeline = pipe()
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 3, PIXELS, PIXELS, dtype=torch.float64)
    with tokentrim.patched(pipeline, FlowMo(step=0.05, optimiser="descent")) as handle:
        torch.manual_seed(1)
        both = pipeline.inference(noise, ["a"] * 2, return_latents=True)[1]
        assert len(handle.report) == 2
    alone, first = pipe(), []
    alone.generator.register_forward_pre_hook(
        lambda module, args, kwargs: first.append(kwargs["noisy_image_or_video"]), with_kwargs=True
    )
    with tokentrim.patched(alone, FlowMo(step=0.05, optimiser="descent")):
        alone.inference(noise[:1], ["a"], return_latents=True)
    assert both.shape[0] == 2 and len(first) >= 2
    expected = moved_by_hand(pipe(), noise, 1.0, FlowMo(step=0.05, optimiser="descent"))
    assert torch.allclose(first[1], expected[:1], atol=1e-9)
