"""Policies refuse bad settings and follow Algorithm 1 to the letter."""

import math
from functools import partial

import pytest
import torch

from tokentrim_hooks import DriftPolicy, History, ObservePolicy, Policy, make_policy
from tokentrim_hooks.testing import ForcedPolicy, chunk_of

BAD = [
    ({"fraction": -0.1}, "fraction"),
    ({"fraction": 0}, "fraction"),
    ({"fraction": 1.5}, "fraction"),
    ({"fraction": math.nan}, "fraction"),
    ({"fraction": "0.1"}, "fraction"),
    ({"fraction": True}, "fraction"),
    ({"sensitivity": -1}, "sensitivity"),
    ({"sensitivity": math.inf}, "sensitivity"),
    ({"warmup": -1}, "warmup"),
    ({"warmup": 1.5}, "warmup"),
    ({"max_regenerations": -1}, "max_regenerations"),
    ({"persist": 1}, "persist"),
    ({"prune_anchors": "yes"}, "prune_anchors"),
    ({"coarse": "some"}, "coarse"),
]


@pytest.mark.parametrize(("settings", "name"), BAD)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        DriftPolicy(**settings)


def test_observe_policy_checks_its_settings_too():
    with pytest.raises(ValueError, match="fraction"):
        ObservePolicy(fraction=-1)


def test_the_defaults_are_the_papers():
    policy = DriftPolicy()
    assert (policy.fraction, policy.sensitivity, policy.warmup, policy.max_regenerations) == (0.1, 2.0, 2, 1)


def history(count, mean=1.0, std=0.5):
    wide = {"dtype": torch.float64}
    return History(count, torch.tensor([mean], **wide), torch.tensor([std], **wide))


@pytest.mark.parametrize(
    ("severity", "count", "prune"),
    [
        (2.1, 3, True),  # above 1 + 2 * 0.5
        (2.0, 3, False),  # equal is not above
        (1.9, 3, False),
        (9.0, 1, False),  # warm-up: one severity seen
        (9.0, 2, True),  # warm-up is over with the second
        (9.0, 0, False),
    ],
)
def test_trigger(severity, count, prune):
    drift = torch.full((1, 10), 0.1)
    drift[0, 7] = severity
    verdict = DriftPolicy(fraction=0.1).judge(chunk_of(drift), history(count))
    assert verdict.tokens.tolist() == [[7]]
    assert verdict.severity.item() == pytest.approx(severity)
    assert verdict.threshold.item() == (2.0 if count else math.inf)
    assert verdict.prune.tolist() == [prune]


def test_no_warmup_still_needs_one_severity():
    assert not DriftPolicy(warmup=0).judge(chunk_of(torch.ones(1, 10)), history(0)).prune.any()
    assert DriftPolicy(warmup=0).judge(chunk_of(torch.full((1, 10), 9.0)), history(1)).prune.all()


def test_observe_measures_the_same_and_never_prunes():
    drift = torch.arange(20.0).view(2, 10)
    both = History(3, torch.ones(2), torch.zeros(2))
    chunk = chunk_of(drift)
    seen, judged = ObservePolicy(0.2, 1.0).judge(chunk, both), DriftPolicy(0.2, 1.0).judge(chunk, both)
    assert torch.equal(seen.tokens, judged.tokens) and torch.equal(seen.severity, judged.severity)
    assert torch.equal(seen.threshold, judged.threshold)
    assert judged.prune.all() and not seen.prune.any()


@pytest.mark.parametrize("policy", [DriftPolicy(), ObservePolicy(), ForcedPolicy()])
def test_all_are_policies(policy):
    assert isinstance(policy, Policy)


@pytest.mark.parametrize(
    ("plan", "tokens", "prune"),
    [
        ((1, 4), [[1, 4], [1, 4]], [True, True]),
        (0.2, [[9, 8], [9, 8]], [True, True]),
        ([[1], []], [[1], [0]], [True, False]),
        ([[1, 2], [3]], [[1, 2], [3, 3]], [True, True]),
        (None, [[9], [9]], [False, False]),
    ],
)
def test_forced_policy_prunes_what_it_is_told(plan, tokens, prune):
    drift = torch.arange(10.0).repeat(2, 1)
    policy = ForcedPolicy({} if plan is None else {3: plan})
    verdict = policy.judge(chunk_of(drift, index=3), History(2, torch.zeros(2), torch.zeros(2)))
    assert verdict.tokens.tolist() == tokens
    assert verdict.prune.tolist() == prune


def test_forced_policy_can_choose_samples():
    policy = ForcedPolicy({3: (1,)}, samples=(1,))
    verdict = policy.judge(chunk_of(torch.ones(2, 4), index=3), History(2, torch.zeros(2), torch.zeros(2)))
    assert verdict.prune.tolist() == [False, True]


@pytest.mark.parametrize("wrong", ["persists", "max_regeneration", "fracton"])
def test_an_option_that_there_is_none_of_is_an_error_by_its_name(wrong):
    """Never silence: a typo would run the paper's policy under another's name."""
    for make in (DriftPolicy, partial(make_policy, "drift"), partial(make_policy, "adaptive")):
        with pytest.raises(TypeError, match=wrong):
            make(**{wrong: False})
