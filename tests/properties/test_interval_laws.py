"""Laws of paired comparisons, for any arms. Values are quarters, so that sums and differences are exact."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokentrim_hooks.metrics.intervals import Difference, adjusted, paired_difference

QUARTERS = st.integers(-400, 400).map(lambda number: number / 4)
PAIRS = st.lists(st.tuples(QUARTERS, QUARTERS), min_size=2, max_size=20)
TESTS = st.sampled_from(["t", "sign-flip"])
PS = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def compared(pairs, test="t"):
    return paired_difference([a for a, _ in pairs], [b for _, b in pairs], test=test)


def table(ps):
    return [Difference(0, 1, 1, -1, 3, p, p, 6) for p in ps]


def same(one, two):
    return dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(two), rel=1e-9, abs=1e-12, nan_ok=True)


@given(PAIRS, TESTS)
def test_swapping_the_arms_turns_the_sign(pairs, test):
    there, back = compared(pairs, test), compared([(b, a) for a, b in pairs], test)
    turned = Difference(there.treated, there.base, -there.mean, -there.high, -there.low, there.p, there.q, len(pairs))
    assert same(back, turned)
    assert {there.words("lower"), back.words("lower")} in (
        {"better", "worse"}, {"no difference shown"}, {"too few pairs"}
    )  # fmt: skip


@given(PAIRS, QUARTERS, TESTS)
def test_shifting_both_arms_changes_nothing_but_their_means(pairs, shift, test):
    found, moved = compared(pairs, test), compared([(a + shift, b + shift) for a, b in pairs], test)
    assert same(moved, dataclasses.replace(found, base=found.base + shift, treated=found.treated + shift))


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_says_nothing(pairs, rng: random.Random):
    assert same(compared(pairs), compared(rng.sample(pairs, len(pairs))))


@given(PAIRS)
def test_the_interval_excludes_zero_where_p_is_small(pairs):
    found = compared(pairs)
    if found.low < found.high:
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)
    assert found.low <= found.mean <= found.high


@given(PS)
def test_adjusting_keeps_the_order_and_never_helps(ps):
    qs = [d.q for d in adjusted(table(ps))]
    assert all(q >= p or q == pytest.approx(p) for p, q in zip(ps, qs, strict=True))
    ordered = [q for _, q in sorted(zip(ps, qs, strict=True))]
    assert ordered == sorted(ordered)


@given(PS, st.data())
def test_one_larger_p_makes_no_q_smaller(ps, data):
    index = data.draw(st.integers(0, len(ps) - 1))
    larger = [*ps[:index], data.draw(st.floats(ps[index], 1)), *ps[index + 1 :]]
    before, after = (adjusted(table(some)) for some in (ps, larger))
    assert all(b.q >= a.q or b.q == pytest.approx(a.q) for a, b in zip(before, after, strict=True))


@given(PS)
def test_a_comparison_more_without_an_effect_makes_no_q_smaller(ps):
    before, after = adjusted(table(ps)), adjusted(table([*ps, 1.0]))[:-1]
    assert all(b.q >= a.q for a, b in zip(before, after, strict=True))
