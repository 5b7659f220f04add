"""Intervals and verdicts against textbook figures, and how often they see an effect where there is none."""

import math
import warnings

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from tokentrim_hooks.metrics.intervals import Difference, adjusted, paired_difference, sign_flip, t_interval

DRAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, shape),
    "two skewed arms": lambda rng, shape: rng.lognormal(size=shape) - rng.lognormal(size=shape),
    "mostly zero": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.3),
    "skewed": lambda rng, shape: rng.lognormal(0, 0.5, shape) - math.exp(0.5**2 / 2),
    "very skewed": lambda rng, shape: rng.lognormal(0, 1, shape) - math.exp(0.5),
}
"""Differences with a true mean of zero."""
BANDS = {
    "normal": {6: (4, 6), 8: (4, 6), 12: (4, 6), 64: (4, 6)},
    "heavy tails": {6: (3, 5), 8: (3, 5), 12: (3, 5.5), 64: (4, 6)},
    "two skewed arms": {6: (2, 4), 8: (2, 4), 12: (2, 5), 64: (3, 6)},
    "mostly zero": {6: (0, 1), 8: (0, 1), 12: (0.5, 2), 64: (4, 6)},
    "skewed": {6: (6, 10), 8: (6, 10), 12: (6, 9), 64: (4.5, 7)},
    "very skewed": {6: (14, 20), 8: (14, 20), 12: (12, 19), 64: (7, 12)},
}
"""Percent of "excludes zero" by kind of difference and number of pairs; the module's docstring says the same."""


def differences_of(values):
    """One Difference for each row of ``values``, as :func:`paired_difference` makes it."""
    lows, highs, ps = t_interval(values)
    size = values.shape[-1]
    return [
        Difference(0.0, mean, mean, low, high, p, p, size)
        for mean, low, high, p in zip(values.mean(-1).tolist(), lows.tolist(), highs.tolist(), ps.tolist(), strict=True)
    ]


@pytest.mark.parametrize("pairs", [6, 8, 12, 64])
@pytest.mark.parametrize("kind", DRAWS)
def test_without_an_effect_the_interval_excludes_zero_about_as_often_as_it_says(kind, pairs):
    values = DRAWS[kind](np.random.default_rng(pairs), (20_000, pairs))
    low, high, p = t_interval(values)
    rate = 100 * np.mean((low > 0) | (high < 0))
    least, most = BANDS[kind][pairs]
    assert least <= rate <= most, f"{rate:.1f} %"
    # Rows of zeros only have the interval [0, 0], and p = 1: the two say the same everywhere.
    assert np.array_equal((low > 0) | (high < 0), p < 0.05)


def test_two_pairs_have_an_honest_interval_and_no_verdict():
    values = np.random.default_rng(2).standard_normal((20_000, 2))
    low, high, _ = t_interval(values)
    assert 4 <= 100 * np.mean((low > 0) | (high < 0)) <= 6, "the bootstrap's was 51 %"
    found = differences_of(values[:2000])
    assert {d.words("lower") for d in found} == {"too few pairs"}
    assert {d.words("lower") for d in adjusted(found)} == {"too few pairs"}


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "two skewed arms"])
def test_without_an_effect_flipped_signs_seldom_find_one(kind):
    values = DRAWS[kind](np.random.default_rng(8), (2000, 8))
    assert 3 <= 100 * np.mean(sign_flip(values) < 0.05) <= 6.5


def test_a_table_of_nothing_seldom_has_a_verdict():
    values = np.random.default_rng(0).standard_normal((400, 100, 12))
    raw, corrected = 0, 0
    for table in values:
        found = differences_of(table)
        raw += any(d.verdict("lower") for d in found)
        corrected += any(d.verdict("lower") for d in adjusted(found))
    assert raw > 390, "without adjusting nearly each table of 100 would have one"
    assert 2 <= 100 * corrected / 400 <= 8


def test_of_all_verdicts_few_are_luck():
    rng = np.random.default_rng(1)
    shares, found_effects = [], 0
    for _ in range(200):
        values = rng.standard_normal((100, 12))
        values[:20] += 1.5
        verdicts = [bool(d.verdict("lower")) for d in adjusted(differences_of(values))]
        shares.append(sum(verdicts[20:]) / max(sum(verdicts), 1))
        found_effects += sum(verdicts[:20])
    assert 0.02 < np.mean(shares) <= 0.05, "80 of 100 are null: the procedure's bound is 4 %"
    assert found_effects > 0.85 * 20 * 200


def test_student_1908():
    # Hours of sleep gained by ten patients with two drugs (Student 1908): t = 4.0621, p = 0.002833, 0.70 to 2.46.
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_difference(one, two)
    assert (found.mean, found.low, found.high) == pytest.approx((1.58, 0.7001142, 2.4598858))
    assert found.p == found.q == pytest.approx(0.00283289)
    assert found.verdict("higher") == "better"
    # One of ten differences is zero and all others are positive: 2 * 2 of 1024 sign vectors reach the sum.
    assert paired_difference(one, two, test="sign-flip").p == 4 / 1024


def test_arms_that_are_equal_or_differ_by_a_constant_warn_of_nothing():
    base = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = paired_difference(base, base)
        more = paired_difference(base, [value + 0.1 for value in base])
        flipped = paired_difference(base, base, test="sign-flip")
    assert (same.mean, same.low, same.high, same.p, flipped.p) == (0, 0, 0, 1, 1)
    assert same.words("lower") == "no difference shown"
    # Every pair differs by as much, however different the pairs are; six equal signs have p = 2 / 64.
    assert (more.low, more.high) == pytest.approx((0.1, 0.1)) and more.p == 2 / 64
    assert more.verdict("higher") == "better"


def test_pairs_with_nothing_to_measure_are_left_out():
    found = paired_difference([1.0, math.nan, 3.0], [2.0, 5.0, 4.0])
    assert (found.pairs, found.base, found.mean) == (2, 2.0, 1.0)


@pytest.mark.parametrize("arms", [([], []), ([1.0], [0.0]), ([math.nan], [1.0]), ([1.0] * 6, [0.0] * 5 + [math.inf])])
def test_nothing_to_prove_it_with(arms):
    found = paired_difference(*arms)
    assert (found.low, found.high) == (-math.inf, math.inf) and math.isnan(found.p) and math.isnan(found.q)
    assert adjusted([found])[0].words("lower") == "too few pairs"


def test_unequal_arms_are_refused():
    with pytest.raises(ValueError, match="equal length, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_comparisons_of_too_few_pairs_do_not_help_the_others():
    def made(p, pairs):
        return Difference(0, 1, 1, 0.5, 1.5, p, p, pairs)

    few, many = [made(0.0, 5)] * 50, [made(p, 6) for p in (0.03, 0.2, 0.04)]
    found = adjusted([*few, *many])
    assert [d.q for d in found[50:]] == pytest.approx([0.06, 0.2, 0.06])
    assert all(math.isnan(d.q) and not d.verdict() for d in found[:50])
    assert [d.q for d in found[50:]] == pytest.approx(false_discovery_control([0.03, 0.2, 0.04]).tolist())


@pytest.mark.parametrize(
    ("mean", "q", "pairs", "better", "words"),
    [
        (-0.2, 0.04, 6, "lower", "better"),
        (-0.2, 0.04, 6, "higher", "worse"),
        (0.2, 0.04, 6, "lower", "worse"),
        (0.2, 0.04, 6, "higher", "better"),
        (0.2, 0.04, 6, "", "higher"),
        (-0.2, 0.04, 6, "", "lower"),
        (-0.2, 0.05, 6, "lower", "no difference shown"),
        (-0.2, 0.04, 5, "lower", "too few pairs"),
        (-0.2, math.nan, 0, "lower", "too few pairs"),
    ],
)
def test_words(mean, q, pairs, better, words):
    assert Difference(0.0, mean, mean, -1.0, 1.0, q, q, pairs).words(better) == words
