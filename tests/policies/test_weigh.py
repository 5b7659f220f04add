"""Keys with a weight: the same as log w added to their scores, in attention written out, through rolls and sinks."""

import math
import os
from dataclasses import dataclass

import pytest
import torch
from by_hand import FRAMES, TOKENS, ByHand, make, run
from hypothesis import given
from hypothesis import strategies as st

import tokentrim_hooks as tokentrim
from tokentrim_hooks import SoftPrune
from tokentrim_hooks.policy.controls import AlwaysPolicy
from tokentrim_hooks.pruning.tap import weighing
from tokentrim_hooks.reference import model as reference_model
from tokentrim_hooks.testing import ForcedPolicy


def written_out(q, k, v, weights):
    """``[B, length, heads, head_dim]``, weights ``[B, keys]``."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + weights.log()[:, None, None]
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Weighing(ByHand):
    """``weighs(kind, start, keys)`` gives weights ``[B, keys]``."""

    def _call(self, latents, timestep, conditional, start):
        level = int(timestep.flatten()[0])
        kind = "commit" if not level else "refine" if level < 1000 else "first"
        native = reference_model.attention
        reference_model.attention = lambda q, k, v: written_out(q, k, v, self.weighs(kind, start, k.shape[1]))
        try:
            return super()._call(latents, timestep, conditional, start)
        finally:
            reference_model.attention = native


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 3), keys=st.integers(1, 20))
def test_two_launches_of_any_kernel_equal_weights_in_the_softmax(seed, batch, keys):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, n, 2, 8, generator=rng) for n in (5, keys, keys))
    weights = torch.rand(batch, keys, generator=rng).clamp(min=0.01)

    def kernel(q, k, v, mask):
        parts = (part.transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)

    rows = weights[:, :, None, None].expand(batch, keys, 2, 1)
    got = weighing(kernel)(q, k, torch.cat([v * rows, rows], -1), None)
    assert torch.allclose(got, written_out(q, k, v, weights), atol=1e-5)


def by_frames(weight, keep, sink, anchors):
    """Weights of keys as the kernel sees them: sinks, older frames, newest ones, the chunk itself."""

    def weighs(kind, start, keys):
        weights = torch.ones(1, keys)
        old = keys // TOKENS - FRAMES - keep
        weights[:, : max(old, 0) * TOKENS] = weight
        if keys > FRAMES * TOKENS:
            weights[:, : sink * TOKENS] = weight if anchors else 1.0
        return weights

    return weighs


@pytest.mark.parametrize("sink", [0, 2])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("anchors", [False, True])
@pytest.mark.parametrize("weight", [0.5, 0.05])
def test_soft_prune_equals_attention_written_out(weight, keep, anchors, sink):
    by_hand, pipeline, plain = make(Weighing, sink_size=sink), make(sink_size=sink), run(make(sink_size=sink))
    by_hand.weighs = by_frames(weight, keep, sink, anchors)
    expected = run(by_hand)
    with tokentrim.patched(pipeline, SoftPrune(weight, keep, anchors)) as handle:
        got = run(pipeline)
    assert (expected - plain).abs().max() > 1e-4
    assert torch.allclose(got, expected, atol=2e-5)
    assert {act["hook"] for record in handle.report for act in record.acts} == {"hide"}
    assert all(bool(torch.isfinite(layer["v"]).all()) for layer in pipeline.kv_cache1)
    assert torch.equal(run(pipeline), plain)


def some(seed, start):
    """Random weights per sample and token of two frames, some of them 0 and some 1."""
    rng = torch.Generator().manual_seed(seed * 1000 + start)
    return (torch.rand(2, 2, TOKENS, generator=rng) * 1.5 - 0.25).clamp(0, 1)


@dataclass(frozen=True)
class WeighSome(tokentrim.Policy):
    """Random weights of the two newest frames, at calls of some phases."""

    requires = frozenset({"weigh"})
    seed: int = 0
    phases: tuple[str, ...] = ("first", "refine", "commit")

    def hide(self, chunk, context):
        if chunk.phase not in self.phases or context.frames < 2:
            return None
        weights = torch.ones(2, context.frames, context.tokens)
        weights[:, -2:] = some(self.seed, chunk.start)
        return weights


@given(seed=st.integers(0, 10_000), sink=st.sampled_from([0, 2]), phases=st.sets(
    st.sampled_from(["first", "refine", "commit"]), min_size=1))  # fmt: skip
def test_any_weights_equal_attention_written_out_also_where_a_call_rolls_the_cache(seed, sink, phases):
    by_hand, pipeline = make(Weighing, sink_size=sink), make(sink_size=sink)

    def weighs(kind, start, keys):
        weights = torch.ones(2, keys)
        context = keys // TOKENS - FRAMES
        if kind in phases and context:
            weights[:, (context - 2) * TOKENS : context * TOKENS] = some(seed, start).flatten(1)
        return weights

    by_hand.weighs = weighs
    expected, plain = run(by_hand), run(make(sink_size=sink))
    with tokentrim.patched(pipeline, WeighSome(seed=seed, phases=tuple(phases))):
        got = run(pipeline)
    assert torch.allclose(got, expected, atol=2e-5)
    assert torch.equal(run(pipeline), plain)


def test_weight_0_hides_and_weight_1_changes_no_bit():
    one, none, window, plain = make(), make(), make(), run(make())
    with tokentrim.patched(one, SoftPrune(1.0)) as handle:
        assert torch.equal(run(one), plain) and not any(record.acts for record in handle.report)
    with tokentrim.patched(none, SoftPrune(0.0, keep=2)):
        got = run(none)

    @dataclass(frozen=True)
    class Hides(tokentrim.Policy):
        """All but the two newest frames."""

        def hide(self, chunk, context):
            return torch.arange(context.frames) < context.frames - 2

    with tokentrim.patched(window, Hides()):
        assert torch.allclose(run(window), got, atol=1e-6)


def test_weights_hidden_rows_and_dead_rows_together():
    """What is pruned stays dead, what another policy hides is hidden, and the rest has its weight."""
    dead_from, soft, by_hand = 3, by_frames(0.3, 1, 0, False), make(Weighing)

    def weighs(kind, start, keys):
        weights = soft(kind, start, keys).clone()
        frames = keys // TOKENS
        if kind == "commit":
            weights[:, : (frames - FRAMES) * TOKENS] = 0.0  # CommitWindow(0)
        for frame in range(frames - FRAMES):
            number = start + FRAMES - frames + frame
            if number < dead_from * FRAMES <= start:
                weights[:, frame * TOKENS : frame * TOKENS + 2] = 0.0
        return weights

    by_hand.weighs = weighs
    pipeline = make()
    policies = [ForcedPolicy({dead_from: (0, 1)}), SoftPrune(0.3, 1), tokentrim.CommitWindow(0)]
    with tokentrim.patched(pipeline, policies) as handle:
        got = run(pipeline)
        assert handle.report.triggers
    assert torch.allclose(got, run(by_hand), atol=2e-5)
    assert all(bool(torch.isfinite(layer["v"]).all()) for layer in pipeline.kv_cache1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [16, 24])
def test_whatever_ends_a_call_the_rows_are_as_they_were(kind, call, monkeypatch):
    pipeline, plain = make(), run(make())
    attention = pipeline.generator.model.blocks[1].self_attn
    native = attention.forward
    monkeypatch.setenv("ATTENDED", "0")

    def forward(*args, **kwargs):
        # Counted where nobody looks: what a model counts in a number or a list cannot be called twice, and is refused.
        os.environ["ATTENDED"] = str(int(os.environ["ATTENDED"]) + 1)
        if int(os.environ["ATTENDED"]) == call:
            raise kind
        return native(*args, **kwargs)

    with tokentrim.patched(pipeline, [AlwaysPolicy(warmup=1), SoftPrune(keep=1)]) as handle:
        fresh = run(pipeline)
        handle.reset()
        with monkeypatch.context() as patch:
            patch.setattr(attention, "forward", forward)
            with pytest.raises(kind):
                run(pipeline)
        assert torch.equal(run(pipeline), fresh)
    assert torch.equal(run(pipeline), plain)


def test_a_model_that_reads_its_layers_in_another_order_gets_no_plausible_number(monkeypatch):
    pipeline = make()
    native = pipeline.generator.model.forward

    def backwards(*args, kv_cache=None, **kwargs):
        return native(*args, kv_cache=None if kv_cache is None else kv_cache[::-1], **kwargs)

    monkeypatch.setattr(pipeline.generator.model, "forward", backwards)
    plain = run(pipeline)
    with tokentrim.patched(pipeline, SoftPrune(keep=1)), pytest.raises(tokentrim.UnsupportedContextError):
        run(pipeline)
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("answer", [torch.tensor([1.5]), torch.tensor([-0.1]), torch.tensor([math.nan])])
def test_weights_out_of_range_are_an_error_that_names_the_policy(answer):
    @dataclass(frozen=True)
    class Wrong(tokentrim.Policy):
        """Answers something else."""

        def hide(self, chunk, context):
            return answer.expand(context.frames)

    pipeline = make()
    with tokentrim.patched(pipeline, Wrong()), pytest.raises(tokentrim.PolicyError, match=r"Wrong\.hide returned"):
        run(pipeline)


def test_an_adapter_that_does_not_declare_it_is_refused(monkeypatch):
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    monkeypatch.setattr(SelfForcing, "takes", SelfForcing.takes - {"weigh"})
    pipeline = make()
    with pytest.raises(tokentrim.UnsupportedPolicyError, match="less weight"):
        tokentrim.patch(pipeline, SoftPrune())

    @dataclass(frozen=True)
    class Forgot(tokentrim.Policy):
        """Does not say that it weighs."""

        def hide(self, chunk, context):
            return torch.full((context.frames,), 0.5)

    with tokentrim.patched(pipeline, Forgot()), pytest.raises(tokentrim.UnsupportedPolicyError, match="weighs keys"):
        run(pipeline)
