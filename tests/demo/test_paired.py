"""Bootstrap intervals against distributions that can be counted by hand."""

import math

import pytest

from tokentrim_hooks.metrics.intervals import Difference, interval, paired_difference


def test_two_values_have_three_possible_means():
    # Resampled means of (0, 1) are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the outer ones hold the 2.5 % tails.
    assert interval([0.0, 1.0]) == (0.0, 1.0)


def test_one_hit_in_eight_is_a_binomial():
    # Hits among 8 draws are Binomial(8, 1/8): P(0) = 0.344, P(<= 2) = 0.933, P(<= 3) = 0.989, so 0 to 3 hits of 8 / 8.
    low, high = interval([8.0, *[0.0] * 7])
    assert (low, high) == (0.0, 3.0)
    assert not Difference(0, 0, 1.0, low, high, 8).excludes_zero


def test_the_same_measurements_give_the_same_interval():
    values = [0.3, -1.2, 0.7, 0.1, 2.5]
    assert interval(values) == interval(values)


def test_difference_is_paired_and_not_of_two_crowds():
    base = [10.0, 20.0, 30.0, 40.0]
    found = paired_difference(base, [value + 1 for value in base])
    assert (found.base, found.treated, found.mean) == (25.0, 26.0, 1.0)
    assert (found.low, found.high) == (1.0, 1.0), "every pair differs by one, however different the pairs are"
    assert found.excludes_zero


def test_pairs_with_nothing_to_measure_are_left_out():
    found = paired_difference([1.0, math.nan, 3.0], [2.0, 5.0, 4.0])
    assert (found.pairs, found.base, found.mean) == (2, 2.0, 1.0)


def test_one_pair_proves_nothing():
    found = paired_difference([1.0], [0.0])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert not found.excludes_zero


def test_unequal_arms_are_refused():
    with pytest.raises(ValueError, match="equal length, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("low", "high", "better", "words"),
    [
        (-0.3, -0.1, "lower", "excludes zero: better"),
        (-0.3, -0.1, "higher", "excludes zero: WORSE"),
        (0.1, 0.3, "lower", "excludes zero: WORSE"),
        (0.1, 0.3, "higher", "excludes zero: better"),
        (0.1, 0.3, "", "excludes zero"),
        (-0.1, 0.3, "lower", "does not exclude zero"),
        (0.0, 0.3, "lower", "does not exclude zero"),
        (-0.3, 0.0, "lower", "does not exclude zero"),
        (0.0, 0.0, "lower", "does not exclude zero"),
    ],
)
def test_words(low, high, better, words):
    assert Difference(0.0, 0.0, (low + high) / 2, low, high, 9).words(better) == words
