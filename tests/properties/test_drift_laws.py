"""Laws of the drift mathematics, for any latents."""

import math
from decimal import Decimal
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tokentrim_hooks import DriftPolicy, History, LatentsError, shares_storage
from tokentrim_hooks.policy import drift as drift_equations
from tokentrim_hooks.policy.drift import (
    RunningStatistics,
    Summary,
    latent_summary,
    severity_of,
    token_drift,
    unstable_count,
    unstable_tokens,
)
from tokentrim_hooks.testing import chunk_of
from tokentrim_hooks.testing import strategies as some

WIDE = (torch.float32, torch.float64)


def drift_of(current, previous):
    return token_drift(latent_summary(current), latent_summary(previous))


def pair(recipe, seed):
    return recipe.make(), some.normal(recipe.shape, seed).to(recipe.dtype)


@given(some.latents(), some.seeds())
def test_drift_equals_a_numpy_recomputation(recipe, seed):
    current, previous = pair(recipe, seed)
    b, _f, c, h, w = recipe.shape

    def tokens(x):
        mean = x.double().numpy().mean(axis=1)
        return mean.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, -1)

    expected = np.sqrt(((tokens(current) - tokens(previous)) ** 2).sum(-1))
    np.testing.assert_allclose(drift_of(current, previous).numpy(), expected, rtol=1e-5, atol=1e-5)


@given(some.latents((*WIDE, torch.bfloat16)), some.seeds())
def test_drift_is_the_same_however_the_summaries_are_laid_out(recipe, seed):
    one, other = (Summary.of(x, (2, 2)) for x in pair(recipe, seed))
    drift = one.drift(other)
    torch.testing.assert_close(drift, token_drift(one.tokens, other.tokens))
    assert drift.shape == (recipe.shape[0], one.tokens.shape[1]) and bool((drift >= 0).all())


@given(some.latents(WIDE), some.seeds(), some.fractions())
def test_permuting_tokens_permutes_the_unstable_set(recipe, seed, fraction):
    current, previous = (latent_summary(x) for x in pair(recipe, seed))
    order = torch.argsort(some.normal(current.shape[1:2], seed + 1))
    drift, shuffled = token_drift(current, previous), token_drift(current[:, order], previous[:, order])
    assume(all(row.unique().numel() == row.numel() for row in drift))
    torch.testing.assert_close(shuffled, drift[:, order], rtol=0, atol=0)
    assert torch.equal(order[unstable_tokens(shuffled, fraction)], unstable_tokens(drift, fraction))


@given(some.latents(WIDE), some.seeds(), some.fractions(), st.integers(-6, 6))
def test_scaling_latents_scales_severity(recipe, seed, fraction, exponent):
    current, previous = pair(recipe, seed)
    scale = 2.0**exponent
    drift, scaled = drift_of(current, previous), drift_of(current * scale, previous * scale)
    tokens = unstable_tokens(drift, fraction)
    assert torch.equal(tokens, unstable_tokens(scaled, fraction))
    torch.testing.assert_close(severity_of(scaled, tokens), severity_of(drift, tokens) * scale)


@given(some.latents((torch.float64,)), some.seeds(), st.floats(-10, 10))
def test_a_shift_common_to_both_chunks_changes_nothing(recipe, seed, shift):
    current, previous = pair(recipe, seed)
    torch.testing.assert_close(drift_of(current + shift, previous + shift), drift_of(current, previous))


@given(some.latents((torch.float32,)), some.seeds(), st.data())
def test_a_local_spike_puts_exactly_its_tokens_first(recipe, seed, data):
    previous = recipe.make()
    wide = recipe.shape[-1] // 2
    count = wide * recipe.shape[-2] // 2
    spikes = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count))
    current = previous + 0.01 * some.normal(recipe.shape, seed).float()
    for token in spikes:
        row, column = 2 * (token // wide), 2 * (token % wide)
        current[..., row : row + 2, column : column + 2] += 5
    first = unstable_tokens(drift_of(current, previous), 1.0)[:, : len(spikes)]
    assert all(set(row) == spikes for row in first.tolist())


@given(some.latents(WIDE), some.seeds(), some.policies())
def test_a_batch_is_judged_sample_by_sample(recipe, seed, policy):
    current, previous = pair(recipe, seed)
    severities = [some.normal(recipe.shape[:1], seed + i).abs() for i in range(3)]
    together = _judge(policy, current, previous, severities)
    for b in range(recipe.shape[0]):
        one = slice(b, b + 1)
        alone = _judge(policy, current[one], previous[one], [s[one] for s in severities])
        for name in ("tokens", "prune"):
            assert torch.equal(getattr(together, name)[one], getattr(alone, name)), name
        torch.testing.assert_close(together.severity[one], alone.severity)
        torch.testing.assert_close(together.threshold[one], alone.threshold)


def _judge(policy, current, previous, severities):
    statistics = RunningStatistics.empty(current.shape[0])
    for severity in severities:
        statistics = statistics.updated(severity)
    history = History(statistics.count, statistics.mean, statistics.std)
    return policy.judge(chunk_of(drift_of(current, previous)), history)


@given(st.integers(1, 3), st.integers(1, 40), some.seeds(), st.floats(-3, 6))
def test_running_statistics_equal_a_float64_recomputation(batch, count, seed, magnitude):
    severities = some.normal((count, batch), seed).abs() * 10**magnitude
    statistics = RunningStatistics.empty(batch)
    assert statistics.std.tolist() == [0.0] * batch
    for severity in severities:
        statistics = statistics.updated(severity.float())
    rounded = severities.float().double().numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), rounded.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std.numpy(), rounded.std(axis=0), rtol=1e-9, atol=1e-12 * 10**magnitude)


@given(some.latents((torch.float16, torch.bfloat16)), some.seeds(), some.fractions(), st.floats(0, 3))
def test_half_precision_gives_the_verdict_of_float32(recipe, seed, fraction, sensitivity):
    """Judging half-precision latents is judging the same numbers in float32, away from ties."""
    current, previous = pair(recipe, seed)
    policy = DriftPolicy(fraction, sensitivity, warmup=1)
    severities = [severity_of(d, unstable_tokens(d, fraction)) for d in [drift_of(current, previous)]]
    severities.append(severities[0] * 1.01)
    half = _judge(policy, current, previous, severities)
    full = _judge(policy, current.float(), previous.float(), severities)
    margin = (full.severity.double() - full.threshold.double()).abs() / full.threshold.double()
    assume(bool((margin > 1e-5).all()))
    assert torch.equal(half.prune, full.prune)
    torch.testing.assert_close(half.severity, full.severity, rtol=1e-6, atol=0)
    assert half.severity.dtype == torch.float32


@given(st.integers(1, 100_000), st.integers(1, 5000))
def test_the_number_of_unstable_tokens_is_exact_for_decimals(parts, tokens):
    written = Decimal(parts) / 100_000
    assert unstable_count(float(written), tokens) == math.ceil(written * tokens)


@pytest.mark.parametrize(
    ("fraction", "tokens", "count"), [(0.07, 100, 7), (0.1, 1560, 156), (0.1, 30, 3), (0.1, 31, 4)]
)
def test_the_number_of_unstable_tokens_where_floats_mislead(fraction, tokens, count):
    assert unstable_count(fraction, tokens) == count


@given(some.tied_drifts(), some.fractions())
def test_ties_go_to_the_lower_index(drift, fraction):
    chosen = unstable_tokens(drift, fraction)
    for row, tokens in zip(drift.tolist(), chosen.tolist(), strict=True):
        assert tokens == sorted(range(len(row)), key=lambda i: (-row[i], i))[: len(tokens)]


@given(some.spiked_drifts())
def test_planted_spikes_are_the_unstable_set(spiked):
    count, tokens = len(spiked.spikes[0]), spiked.drift.shape[1]
    chosen = unstable_tokens(spiked.drift, 1.0)[:, :count]
    assert [tuple(sorted(row)) for row in chosen.tolist()] == list(spiked.spikes)
    assert torch.equal(unstable_tokens(spiked.drift, count / tokens)[:, :count], chosen)


@given(some.latents(), st.integers(1, 3))
def test_a_grid_that_the_patch_does_not_divide_is_refused(recipe, extra):
    ragged = torch.zeros(*recipe.shape[:-1], recipe.shape[-1] + 2 * extra - 1)
    with pytest.raises(LatentsError, match="not divisible"):
        latent_summary(ragged)


@pytest.mark.parametrize("few", (0, drift_equations.FEW), ids=("chosen", "sorted"))
@given(seed=st.integers(0, 10_000), size=st.integers(1, 200), fraction=st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_the_largest_few_are_those_of_a_stable_sort_whatever_the_ties(few, seed, size, fraction):
    rng = torch.Generator().manual_seed(seed)
    # Few different values, so that most are ties; both zeros, infinities and negatives among them.
    values = torch.tensor([0.0, -0.0, 1.0, 1.0000001, 2.5, -3.0, 1e-40, math.inf, -math.inf])
    drift = values[torch.randint(len(values), (3, size), generator=rng)]
    count = unstable_count(fraction, size)
    expected = [sorted(range(size), key=lambda place: (-row[place], place))[:count] for row in drift.tolist()]
    with mock.patch.object(drift_equations, "FEW", few):
        assert unstable_tokens(drift, fraction).tolist() == expected
        assert unstable_tokens(drift.double(), fraction).tolist() == expected


@given(some.latents((*WIDE, torch.bfloat16, torch.float16)))
def test_frames_added_one_by_one_are_their_mean(recipe):
    latents = recipe.make()
    with mock.patch.object(drift_equations, "LARGE", 0):
        added = Summary.of(latents, (1, 1)).mean
    expected = Summary.of(latents, (1, 1)).mean
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-6)
    assert added.dtype == expected.dtype and not shares_storage(added, latents)
