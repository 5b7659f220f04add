"""A policy that asks for what a model does not have is refused in words, and the model is left alone."""

import pytest
import torch
from by_hand import make, run

import tokentrim_hooks as tokentrim
from tokentrim_hooks.api import NEEDS
from tokentrim_hooks.plugins import usable_adapters


def test_needs_are_the_hooks_a_policy_overrides():
    assert tokentrim.DriftPolicy().needs == {"judge"}
    assert tokentrim.CommitWindow().needs == {"hide", "commit"}
    assert tokentrim.LatentMoments().needs == {"correct"} and tokentrim.RowMoments().needs == {"settle"}


@pytest.mark.parametrize("need", ["commit", "hide", "correct", "settle", "guide", "weigh"])
def test_a_model_without_it_refuses(need, monkeypatch):
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    policy = {"commit": tokentrim.CommitWindow(), "hide": tokentrim.CommitWindow(),
              "correct": tokentrim.LateMean(), "settle": tokentrim.RowMoments(),
              "guide": tokentrim.FlowMo(), "weigh": tokentrim.SoftPrune()}[need]  # fmt: skip
    monkeypatch.setattr(SelfForcing, "takes", SelfForcing.takes - {need})
    pipeline = make()
    with pytest.raises(tokentrim.UnsupportedPolicyError, match=NEEDS[need]) as caught:
        tokentrim.patch(pipeline, [tokentrim.DriftPolicy(), policy])
    assert str(caught.value).count("\n") == 1
    assert not tokentrim.is_patched(pipeline) and torch.equal(run(pipeline), run(make()))


def test_adapters_declare_only_what_there_is():
    for info in usable_adapters():
        assert {"judge"} <= info.loaded.takes <= NEEDS.keys(), info.name


@pytest.mark.parametrize("options", [
    {"frames": -1}, {"frames": 1.5}, {"anchors": 1}])  # fmt: skip
def test_bad_options_of_a_commit_window_name_the_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tokentrim.CommitWindow(**options)


@pytest.mark.parametrize("make_policy", [
    lambda: tokentrim.RowMoments(1.5), lambda: tokentrim.RowMoments(of=()), lambda: tokentrim.RowMoments(of=("q",)),
    lambda: tokentrim.RowMoments(reference="last"), lambda: tokentrim.LatentMoments(-0.1),
    lambda: tokentrim.LatentMoments(channels=(-1,)), lambda: tokentrim.LateMean(0)])  # fmt: skip
def test_bad_options_of_the_others_raise(make_policy):
    with pytest.raises(ValueError):
        make_policy()
