"""The search for AdaptivePolicy's options: on tuning seeds only, and what it says was flagged is what a run flags."""

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
from tokentrim_hooks.experiments.search.__main__ import settings, shares
from tokentrim_hooks.experiments.search.watched import TUNING, kept, watch

SEEDS = TUNING[:2]


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return folder, kept(folder, "fading", "settled", SEEDS, 10)


@pytest.mark.parametrize("seeds", [[1], [64], [4999, 5000], [6000]])
def test_seeds_that_tables_report_are_refused(seeds):
    with pytest.raises(TokenTrimError, match="5000 to 5999"):
        watch("fading", None, seeds, 2)


def test_what_was_watched_is_kept(settled):
    folder, first = settled
    again = kept(folder, "fading", "settled", SEEDS, 10)
    assert (again.name, again.grid, again.watch) == ("fading, settled", (8, 8), 10)
    for old, new in zip(first.shown, again.shown, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("policy", [tokentrim.AdaptivePolicy(), tokentrim.DriftPolicy(sensitivity=0.5)], ids=str)
def test_flags_are_those_of_a_run_up_to_its_first_prune(settled, policy):
    flags = settled[1].flags(policy)
    trial = ReferenceMaker.load(10, "settled", None, True, "cpu")(SEEDS)
    with tokentrim.patched(trial.model, policy) as handle:
        trial.run()
    for sample in range(len(SEEDS)):
        pruned = [r.chunk for r in handle.report if r.sample == sample and r.pruned]
        found = [chunk for chunk, flag in enumerate(flags[:, sample].tolist(), 1) if flag]
        assert pruned and found[0] == pruned[0]


def test_shares_are_counted_by_video_by_chunk_and_before_the_fault(settled):
    policy = tokentrim.DriftPolicy(sensitivity=0.5)
    flags = settled[1].flags(policy).float()
    found = shares(policy, [settled[1]])
    assert found == {
        "fading, settled": pytest.approx(float(flags[9].mean())),
        "true scenes": pytest.approx(float(flags[:7].mean())),
    }


def test_the_frozen_setting_is_one_of_the_grid():
    assert tokentrim.AdaptivePolicy() in list(settings())
