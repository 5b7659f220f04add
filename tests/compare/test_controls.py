"""Control policies: same trigger, other tokens; the global random stream is not theirs."""

import pytest
import torch
from tiny_reference import make, run

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.controls import AlwaysPolicy, ChooseTokens, FreshNoise
from tokentrim_hooks.policy.token_trim import DriftPolicy
from tokentrim_hooks.policy.views import History
from tokentrim_hooks.testing import chunk_of

DRIFT = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 0.5, 0.1, 0.2, 0.3, 0.4], [0.0, 9, 8, 7, 6, 5, 4, 3, 2, 1]])
PAPER = DriftPolicy(fraction=0.2, sensitivity=0.0)
CALM = History(5, torch.tensor([4.0, 99.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


def test_least_drifting_tokens_die_when_the_policy_triggers():
    verdict = ChooseTokens(PAPER, "least").judge(chunk_of(DRIFT, index=5), CALM)
    assert [sorted(row) for row in verdict.tokens.tolist()] == [[6, 7], [0, 9]]
    assert verdict.severity.tolist() == [4.5, 8.5] and verdict.prune.tolist() == [True, False]


def test_random_tokens_are_as_many_distinct_and_repeatable():
    before = torch.get_rng_state()
    picks = [ChooseTokens(PAPER, "random", seed).judge(chunk_of(DRIFT, index=5), CALM).tokens for seed in range(40)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(len(set(row)) == 2 for pick in picks for row in pick.tolist())
    assert torch.equal(picks[3], ChooseTokens(PAPER, "random", 3).judge(chunk_of(DRIFT, index=5), CALM).tokens)
    counts = torch.bincount(torch.stack(picks)[:, 0].flatten(), minlength=10)
    assert counts.sum() == 80 and counts.min() > 0 and counts.max() < 25


def test_always_prunes_after_the_warmup_only():
    early = History(1, CALM.mean, CALM.std)
    assert AlwaysPolicy(0.2).judge(chunk_of(DRIFT, index=5), early).prune.tolist() == [False, False]
    verdict = AlwaysPolicy(0.2).judge(chunk_of(DRIFT, index=5), CALM)
    assert verdict.prune.tolist() == [True, True]
    assert [sorted(row) for row in verdict.tokens.tolist()] == [[0, 2], [1, 2]]


def test_wrappers_pass_options_on():
    inner = DriftPolicy(persist=False, prune_anchors=True, max_regenerations=3, coarse="all")
    outer = FreshNoise(ChooseTokens(inner, "least"))
    assert (outer.persist, outer.prune_anchors, outer.max_regenerations, outer.coarse) == (False, True, 3, "all")


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_replaying_without_pruning_gives_the_same_bits(probe):
    plain = run(make(), batch=2)
    pipeline = make()
    with tokentrim.patch(pipeline, ChooseTokens(AlwaysPolicy(), "none"), probe=probe) as handle:
        again = run(pipeline, batch=2)
    assert torch.equal(plain, again)
    assert [r.regenerations for r in handle.report if r.sample == 0] == [0, 0, 0, 1, 1]
    assert all(r.dead == 0 and r.tokens == () for r in handle.report)


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_new_noise_without_pruning_is_another_draw_for_the_flagged_chunks_only(probe):
    plain = run(make())
    pipeline = make()
    policy = FreshNoise(ChooseTokens(AlwaysPolicy(), "none"), seed=4)
    with tokentrim.patch(pipeline, policy, probe=probe) as handle:
        again = run(pipeline)
    state = torch.get_rng_state()
    run(make())
    assert torch.equal(state, torch.get_rng_state()), "a control must leave the other arms' noise alone"
    assert torch.equal(plain[:, :6], again[:, :6]) and not torch.equal(plain[:, 6:8], again[:, 6:8])
    assert sum(r.dead for r in handle.report) == 0 and handle.report.triggers == 2


def test_new_noise_is_what_the_model_is_given():
    """The flagged chunk, unpatched, but with the control's noise in the place of its own."""
    policy = FreshNoise(ChooseTokens(AlwaysPolicy(warmup=3), "none"), seed=9)
    pipeline = make()
    with tokentrim.patch(pipeline, policy):
        expected = run(pipeline)
    pipeline = make()
    torch.manual_seed(0)
    noise = torch.randn(1, 10, 3, 8, 8)
    noise[:, 8:10] = policy.redraw(noise[:, 8:10], 8)
    actual = pipeline.inference(noise, return_latents=True)[1]
    assert torch.equal(expected, actual)


def test_pruning_from_new_noise_still_proves_itself():
    pipeline = make()
    with tokentrim.patch(pipeline, FreshNoise(AlwaysPolicy())) as handle:
        video = run(pipeline)
    assert torch.isfinite(video).all() and sum(r.dead for r in handle.report) > 0
