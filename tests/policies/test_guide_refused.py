"""Where a policy cannot guide it is refused in words, and what a guide may not answer is an error."""

import math
from dataclasses import dataclass

import pytest
import torch
from by_hand import FRAMES, PIXELS, make, run
from guiding import pipe, video

import tokentrim_hooks as tokentrim
from tokentrim_hooks import FlowMo, UnsupportedPolicyError
from tokentrim_hooks.ranks.agreement import Alone
from tokentrim_hooks.rollout.guidance import Guidance


def refused(pipeline, policy, words, run=video):
    plain = video(pipe())
    with tokentrim.patched(pipeline, policy), pytest.raises(UnsupportedPolicyError, match=words) as caught:
        run(pipeline)
    assert str(caught.value).count("\n") <= 2
    return plain


def test_inference_mode_is_refused():
    pipeline = pipe()

    def run_in(pipeline):
        with torch.inference_mode():
            return video(pipeline)

    refused(pipeline, FlowMo(), "inference_mode", run_in)
    with torch.inference_mode():
        assert torch.equal(video(pipe()), video(pipeline))


@pytest.mark.parametrize("frames", [1, 2])
def test_too_few_frames_are_refused(frames):
    pipeline = make(num_frame_per_block=frames)
    refused(pipeline, FlowMo(), f"this chunk has {frames}", lambda p: run(p) if frames == FRAMES else run_one(p))


def run_one(pipeline):
    return pipeline.inference(torch.randn(1, 3, 3, PIXELS, PIXELS), ["a"], return_latents=True)[1]


def test_compiled_parts_are_refused():
    pipeline = pipe()
    with tokentrim.patched(pipeline, FlowMo()):
        pipeline.generator.model.blocks[0].compile(backend="eager")
        with pytest.raises(UnsupportedPolicyError, match="is compiled"):
            video(pipeline)
    torch._dynamo.reset()


def test_ranks_that_share_a_video_are_refused(monkeypatch):
    """What such ranks agree by is another class than a process's that shares with nobody."""

    class Several(Alone):
        """Agrees as one that is alone does, but is not."""

    pipeline, native = pipe(), Guidance._require_gradients

    def shared(self, given):
        monkeypatch.setattr(self._failures, "ranks", Several())
        return native(self, given)

    monkeypatch.setattr(Guidance, "_require_gradients", shared)
    with tokentrim.patched(pipeline, FlowMo()), pytest.raises(UnsupportedPolicyError, match="several ranks make this"):
        video(pipeline)
    monkeypatch.undo()
    assert torch.equal(video(pipeline), video(pipe()))


def test_an_adapter_that_does_not_declare_it_is_refused_at_the_patch(monkeypatch):
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    monkeypatch.setattr(SelfForcing, "takes", SelfForcing.takes - {"guide"})
    pipeline = pipe()
    with pytest.raises(UnsupportedPolicyError, match="scratch cache"):
        tokentrim.patch(pipeline, FlowMo())
    assert torch.equal(video(pipeline), video(pipe()))


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        pipeline = pipe()
    refused(pipeline, FlowMo(), "weights keep no gradients")


def test_a_sampler_that_integrates_is_told_at_its_second_chunk():
    pipeline = pipe()
    native = pipeline._denoise

    def integrates(noisy, conditional, start):
        return native(noisy, conditional, start).clone()

    pipeline._denoise = integrates
    refused(pipeline, FlowMo(), "does not commit the x0")


def test_with_on_error_warn_the_video_is_the_unpatched_one():
    pipeline = make(num_frame_per_block=2)
    warned = pytest.warns(tokentrim.TokenTrimWarning, match="this chunk has 2")
    with warned, tokentrim.patched(pipeline, FlowMo(), on_error="warn"):
        got = run(pipeline)
    assert torch.equal(got, run(make(num_frame_per_block=2)))


@pytest.mark.parametrize("answer", [lambda x: x[:, :1], lambda x: 3, lambda x: x[0]])
def test_another_shape_is_an_error_that_names_the_policy(answer):
    @dataclass(frozen=True)
    class Wrong(tokentrim.Policy):
        """Answers something else."""

        def guide(self, chunk):
            return answer(chunk.latents)

    pipeline = pipe()
    with tokentrim.patched(pipeline, Wrong()), pytest.raises(tokentrim.PolicyError, match=r"Wrong\.guide returned"):
        video(pipeline)
    assert torch.equal(video(pipeline), video(pipe()))


def test_the_level_is_the_schedulers():
    levels, pipeline = [], pipe()

    class Levels(tokentrim.Policy):
        """Keeps the levels."""

        def guide(self, chunk):
            levels.append(chunk.level())
            return None

    with tokentrim.patched(pipeline, Levels()):
        video(pipeline, chunks=2)
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(levels, [1, 0.75, 0.5, 0.25] * 2, strict=True))
