"""Whatever ends a look ahead leaves nothing, and every video is guided at its own first chunk."""

from dataclasses import dataclass, field

import pytest
import torch
from by_hand import PIXELS, twin_of
from guiding import Descends, bits_of, expected_video, pipe, video

import tokentrim_hooks as tokentrim
from tokentrim_hooks import FlowMo
from tokentrim_hooks.policy.controls import AlwaysPolicy


@dataclass(frozen=True)
class Breaks(Descends):
    """Raises in guide before, inside or behind the look ahead, once."""

    kind: type = RuntimeError
    where: str = "inside"
    state: dict = field(default_factory=lambda: {"armed": True})

    def guide(self, chunk):
        if chunk.index != self.chunk or not self.state["armed"]:
            return None
        self.state["armed"] = False
        if self.where == "before":
            raise self.kind
        if self.where == "inside":
            hook = self.state["attention"].register_forward_hook(self._raise)
            try:
                chunk.predict(chunk.latents)
            finally:
                hook.remove()
        super().guide(chunk)
        raise self.kind

    def _raise(self, *_):
        raise self.kind


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("where", ["before", "inside", "behind"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_whatever_ends_a_look_ahead_leaves_nothing(kind, where, chunk):
    pipeline, plain = pipe(), video(pipe())
    attention = pipeline.generator.model.blocks[1].self_attn
    policy = Breaks(chunk, kind=kind, where=where, state={"armed": True, "attention": attention})
    always = AlwaysPolicy(warmup=1)
    with tokentrim.patched(pipe_fresh := pipe(), always):
        fresh = video(pipe_fresh)
    with tokentrim.patched(pipeline, [always, policy, tokentrim.CommitWindow(3)]):
        with pytest.raises(kind):
            video(pipeline)
        caches = bits_of(pipeline.kv_cache1)
        assert not any(tensor.requires_grad for tensor in caches)
        assert not any(bool(torch.isneginf(layer["v"]).any()) for layer in pipeline.kv_cache1)
    with tokentrim.patched(pipeline, always):
        assert torch.equal(video(pipeline), fresh)
    assert torch.equal(video(pipeline), plain)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_the_next_video_of_the_same_patch_is_guided_as_if_nothing_had_happened(kind):
    pipeline, expected = pipe(), expected_video(FlowMo(step=0.05))
    armed = [True]

    @dataclass(frozen=True)
    class Once(FlowMo):
        """Fails once."""

        def guide(self, chunk):
            if armed and armed.pop():
                chunk.predict(chunk.latents)
                raise kind
            return super().guide(chunk)

    with tokentrim.patched(pipeline, Once(step=0.05)):
        with pytest.raises(kind):
            video(pipeline)
        assert torch.allclose(video(pipeline), expected, atol=1e-9)


def test_videos_that_alternate_are_each_guided_at_their_own_first_chunk():
    pipeline, policy = pipe(), FlowMo(step=0.05)
    expected, other = expected_video(policy), []

    def between(index, count, chunk):
        if index == 0 and not other:
            other.append(None)
            twin = twin_of(pipeline)
            state = torch.get_rng_state()
            other[0] = video(twin)
            torch.set_rng_state(state)

    with tokentrim.patched(pipeline.generator, policy):
        torch.manual_seed(0)
        noise = torch.randn(2, 12, 3, PIXELS, PIXELS, dtype=torch.float64)
        got = pipeline.inference(noise, ["a"] * 2, return_latents=True, on_chunk=between)[1]
    assert torch.allclose(other[0], expected, atol=1e-9) and torch.allclose(got, expected, atol=1e-9)


def test_a_second_video_is_guided_at_its_first_chunk_too():
    pipeline, expected = pipe(), expected_video(FlowMo(step=0.05))
    with tokentrim.patched(pipeline, FlowMo(step=0.05)) as handle:
        assert torch.allclose(video(pipeline), expected, atol=1e-9)
        assert torch.allclose(video(pipeline), expected, atol=1e-9)
    guided = [(record.video, record.chunk) for record in handle.report if record.acts and record.sample == 0]
    assert guided == [(0, 0), (1, 0)]
