"""The search for AdaptivePolicy's options: on tuning seeds only, and what it says was flagged is what a run flags."""

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
from tokentrim_hooks.experiments.search.__main__ import settings, shares
from tokentrim_hooks.experiments.search.levers import Pair, Shaped, Wide, repaired
from tokentrim_hooks.experiments.search.watched import TUNING, kept, watch
from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.policy.drift import RunningStatistics, token_drift

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


def shown_again(watched, policy):
    """What the policy was shown of the last chunk, and what its history was."""
    statistics = RunningStatistics.empty(len(SEEDS), keep=policy.recalls)
    for index, shown in enumerate(watched.shown, 1):
        chunk = tokentrim.Chunk(
            "first", index, 3 * index, 3, watched.grid, drift=token_drift(shown["summary"], shown["previous"]), **shown
        )
        history = tokentrim.History(statistics.count, statistics.mean, statistics.std, statistics.recent)
        verdict = policy.judge(chunk, history)
        statistics = statistics.updated(verdict.severity)
    return chunk, verdict


@pytest.mark.parametrize("share", [0.4, 0.8, 1.0])
def test_a_shaped_set_is_what_stands_out_and_its_mean_the_severity(settled, share):
    policy = Shaped(share=share, most=0.5)
    chunk, verdict = shown_again(settled[1], policy)
    for sample, score in enumerate(policy.novelty(chunk)):
        ranked = sorted(enumerate(score.tolist()), key=lambda pair: -pair[1])[:32]
        inside = [(token, value) for token, value in ranked if value >= share * ranked[0][1]]
        assert set(verdict.tokens[sample].tolist()) == {token for token, _ in inside}
        mean = sum(value for _, value in inside) / len(inside)
        assert float(verdict.severity[sample]) == pytest.approx(mean, rel=1e-5)
        assert bool(verdict.prune[sample]) == (mean > float(verdict.threshold[sample]))


def test_a_wide_set_notices_the_same_and_prunes_no_less(settled):
    usual, wide = AdaptivePolicy(), Wide()
    (chunk, before), (_, after) = shown_again(settled[1], usual), shown_again(settled[1], wide)
    assert torch.equal(before.prune, after.prune) and torch.equal(before.severity, after.severity)
    for sample, score in enumerate(wide.novelty(chunk)):
        named, own = (set(verdict.tokens[sample].tolist()) for verdict in (after, before))
        over = {token for token, value in enumerate(score.tolist()) if value > float(after.threshold[sample])}
        assert own <= named <= own | over and len(named) <= 13
        assert len(own | over) > 13 or named == own | over


def test_two_probes_are_asked_each_of_its_own_rollout_and_joined(settled):
    policy = AdaptivePolicy()
    pair = Pair(settled[1], kept(settled[0], "fading", "settled", SEEDS, 10, "candidate"))
    first, candidate = pair.flags(policy, "first"), pair.flags(policy, "candidate")
    assert not all(
        torch.equal(a["summary"], b["summary"]) for a, b in zip(pair.first.shown, pair.candidate.shown, strict=True)
    )
    assert torch.equal(pair.first.shown[-1]["previous"], pair.candidate.shown[-1]["previous"])
    assert torch.equal(pair.flags(policy, "either"), first | candidate)
    assert torch.equal(pair.flags(policy, "both"), first & candidate)


def test_levers_are_rolled_out_on_tuning_seeds_only():
    with pytest.raises(TokenTrimError, match="5000 to 5999"):
        next(repaired([1], "settled"))
