"""Whatever ends a hook of a policy leaves nothing, and videos that alternate do not share what a policy remembers."""

from dataclasses import dataclass, field

import pytest
import torch
from by_hand import FRAMES, PIXELS, make, run, twin_of

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.controls import AlwaysPolicy

POLICIES = [
    tokentrim.LatentMoments(),
    tokentrim.LateMean(),
    tokentrim.RowMoments(of=("k", "v")),
    tokentrim.CommitWindow(2),
    tokentrim.FrameEviction(similarity=0.99, keep=1),
    tokentrim.SoftPrune(keep=1),
    AlwaysPolicy(warmup=1),
    tokentrim.AdaptivePolicy(sensitivity=0.0, floor=0.0, warmup=1),
]


@dataclass(frozen=True)
class Fails(tokentrim.Policy):
    """Fails in one hook, at one time that it is asked in the fourth chunk."""

    kind: type = RuntimeError
    hook: str = "hide"
    asked: list = field(default_factory=list)

    def _fail(self, hook, chunk):
        if hook == self.hook and chunk.index == 3 and not self.asked:
            self.asked.append(hook)
            raise self.kind

    def guide(self, chunk):
        self._fail("guide", chunk)

    def hide(self, chunk, context):
        self._fail("hide", chunk)

    def correct(self, chunk):
        self._fail("correct", chunk)

    def settle(self, chunk, rows):
        self._fail("settle", chunk)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("hook", ["guide", "hide", "correct", "settle"])
def test_whatever_ends_a_hook_leaves_nothing(kind, hook):
    pipeline, plain, others = make(), run(make()), [AlwaysPolicy(warmup=1), tokentrim.CommitWindow(2)]
    others += [tokentrim.SoftPrune(keep=1), tokentrim.LatentMoments(), tokentrim.RowMoments()]
    fresh_pipeline = make()
    with tokentrim.patched(fresh_pipeline, others):
        fresh = run(fresh_pipeline)
    failing = Fails(kind, hook)
    with tokentrim.patched(pipeline, [*others, failing]):
        with pytest.raises(kind):
            run(pipeline)
        assert failing.asked == [hook]
        assert not any(bool(torch.isneginf(layer["v"]).any()) for layer in pipeline.kv_cache1)
        assert torch.equal(run(pipeline), fresh)
    assert all(bool(torch.isfinite(layer["v"]).all()) for layer in pipeline.kv_cache1)
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_videos_that_alternate_are_each_as_if_made_alone(policy):
    alone, pipeline, other = make(), make(), []
    with tokentrim.patched(alone, policy) as handle:
        expected = run(alone, seed=1), run(alone, seed=2)
        assert handle.report.triggers or any(record.acts for record in handle.report)

    def between(index, count, chunk):
        if index == 3 and not other:
            other.append(None)
            twin = twin_of(pipeline)
            state = torch.get_rng_state()
            other[0] = run(twin, seed=2)
            torch.set_rng_state(state)

    with tokentrim.patched(pipeline.generator, policy):
        torch.manual_seed(1)
        noise = torch.randn(2, 7 * FRAMES, 3, PIXELS, PIXELS)
        got = pipeline.inference(noise, ["a"] * 2, return_latents=True, on_chunk=between)[1]
    assert torch.equal(got, expected[0]) and torch.equal(other[0], expected[1])
