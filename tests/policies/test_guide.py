"""What a policy makes of noisy latents is what the call is made from, and a look ahead leaves the model as it was."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from guiding import Descends, bits_of, descended, pipe, video

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.controls import AlwaysPolicy


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("phases", [("first",), ("refine",), ("first", "refine")])
def test_a_later_chunk_looks_ahead_on_its_whole_context(sink, chunk, phases):
    policy, pipeline = Descends(chunk, phases), pipe(sink_size=sink)
    with tokentrim.patched(pipeline, policy):
        got = video(pipeline, chunks=5)
    expected = descended(policy, sink_size=sink)
    plain = video(pipe(sink_size=sink), chunks=5)
    assert (expected - plain).abs().max() > 1e-5
    assert torch.allclose(got, expected, atol=1e-9)
    assert torch.equal(video(pipeline, chunks=5), plain)


@dataclass(frozen=True)
class Looks(tokentrim.Policy):
    """Looks ahead before every call, and answers nothing; the caches must be, bit for bit, what they were."""

    pipeline: object = None
    looks: list = field(default_factory=list)

    def guide(self, chunk):
        caches = bits_of(self.pipeline.kv_cache1) + bits_of(self.pipeline.crossattn_cache)
        before, state = [(tensor, tensor._version, tensor.clone()) for tensor in caches], torch.get_rng_state()
        with torch.enable_grad():
            z = chunk.latents.detach().clone().requires_grad_()
            x0 = chunk.predict(z)
            assert x0.requires_grad and x0.shape == z.shape and float(torch.autograd.grad(x0.sum(), z)[0].norm()) > 0
        assert all(t._version == version and torch.equal(t, bits) for t, version, bits in before)
        assert not any(tensor.requires_grad for tensor in caches) and torch.equal(state, torch.get_rng_state())
        self.looks.append(chunk.phase)
        return None


@pytest.mark.parametrize("policies", [(), (AlwaysPolicy(warmup=1),), (tokentrim.CommitWindow(3),)], ids=str)
def test_looking_and_answering_nothing_changes_no_bit_of_video_or_cache(policies):
    pipeline, twin = pipe(sink_size=3), pipe(sink_size=3)
    looks = Looks(pipeline=pipeline)
    with tokentrim.patched(twin, list(policies) or tokentrim.ObservePolicy()):
        expected, state = video(twin, chunks=5), torch.get_rng_state()
    with tokentrim.patched(pipeline, [*policies, looks]) as handle:
        assert torch.equal(video(pipeline, chunks=5), expected) and torch.equal(torch.get_rng_state(), state)
    assert looks.looks == ["first", "refine", "refine", "refine"] * 5
    assert not any(act["hook"] == "guide" for record in handle.report for act in record.acts)


def test_a_look_ahead_sees_what_the_call_will_see():
    """Dead rows and rows that are hidden from the call are missing in the look ahead, too."""
    pipeline, looks, made = pipe(sink_size=3), [], []

    @dataclass(frozen=True)
    class Hides(tokentrim.Policy):
        """Hides the first token of the newest frame from first calls, and looks."""

        def hide(self, chunk, context):
            mask = torch.zeros(context.frames, context.tokens, dtype=torch.bool)
            mask[-1:, 0] = True
            return mask if chunk.phase == "first" else None

        def guide(self, chunk):
            looks.append(None)
            looks[-1] = chunk.predict(chunk.latents).detach()
            return None

    def keep(module, args, kwargs, output):
        if len(made) < len(looks) and looks[-1] is not None and kwargs["timestep"].any():  # no replay
            made.append(output[1])

    with tokentrim.patched(pipeline, [AlwaysPolicy(warmup=1), Hides()]):
        hook = pipeline.generator.register_forward_hook(keep, with_kwargs=True)
        video(pipeline, chunks=5)
        hook.remove()
    assert len(looks) == 20 and all(torch.allclose(*pair, atol=1e-12) for pair in zip(looks, made, strict=True))


def test_a_regenerated_chunk_starts_from_the_latents_that_were_moved():
    class Again(tokentrim.Policy):
        """Regenerates every chunk without pruning: the answer must be the same."""

        def judge(self, chunk, history):
            flags = torch.ones(2, dtype=torch.bool)
            return tokentrim.Verdict(torch.empty(2, 0, dtype=torch.long), torch.ones(2), torch.zeros(2), flags)

    one, both = pipe(), pipe()
    with tokentrim.patched(one, Descends()):
        expected = video(one)
    for probe in ("first-step", "candidate"):
        with tokentrim.patched(both, [Again(), Descends()], probe=probe) as handle:
            assert torch.allclose(video(both), expected, atol=1e-9)
            assert sum(record.regenerations for record in handle.report)


def test_policies_guide_one_after_the_other():
    @dataclass(frozen=True)
    class Both(tokentrim.Policy):
        """The two by hand: the second one sees what the first has made."""

        def guide(self, chunk):
            first = Descends(0, ("first",), 0.02).guide(chunk)
            if first is None:
                return None
            return Descends(0, ("first",), 0.05).guide(dataclasses.replace(chunk, latents=first))

    one, two = pipe(), pipe()
    with tokentrim.patched(one, [Descends(0, ("first",), 0.02), Descends(0, ("first",), 0.05)]) as handle:
        expected = video(one)
    acts = [(act["policy"], act["calls"]) for act in handle.report.records[0].acts]
    assert acts == [("Descends", 1), ("Descends 2", 1)]
    with tokentrim.patched(two, Both()):
        assert torch.allclose(video(two), expected, atol=1e-9)
