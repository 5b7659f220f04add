"""Several policies in one list: each does its part, in order, and has a line of its own in the record."""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from by_hand import FRAMES, TOKENS, ByHand, make, moments_moved, run

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.controls import AlwaysPolicy
from tokentrim_hooks.report.record import read_report

V = tokentrim.RowMoments(0.3)
BOTH = tokentrim.RowMoments(0.5, of=("k", "v"))


@dataclass(frozen=True)
class HidesToken(tokentrim.Policy):
    """Hides one token of every frame from the calls of one phase."""

    token: int = 0
    phase: str = "commit"

    def hide(self, chunk, context):
        if chunk.phase != self.phase or not context.frames:
            return None
        mask = torch.zeros(context.frames, context.tokens, dtype=torch.bool)
        mask[:, self.token] = True
        return mask


def reading(dead_of_a_frame):
    """A pipeline by hand in which calls of a kind do not read these tokens of finished frames."""
    by_hand = make(ByHand)

    def reads(kind, keys):
        phase = {0: "first", "commit": "commit"}.get(kind, "refine")
        hidden = torch.zeros(1, keys, dtype=torch.bool)
        for token in dead_of_a_frame.get(phase, ()):
            hidden[:, token : keys - FRAMES * TOKENS : TOKENS] = True
        return hidden

    by_hand.reads = reads
    return by_hand


TWO = [HidesToken(0, "commit"), HidesToken(2, "commit")]
OTHERS = [HidesToken(0, "first"), HidesToken(2, "commit")]


@pytest.mark.parametrize(
    ("policies", "dead"), [(TWO, {"commit": (0, 2)}), (OTHERS, {"first": (0,), "commit": (2,)})], ids=["one", "other"]
)
def test_what_two_policies_hide_is_hidden_in_either_order(policies, dead):
    expected = run(reading(dead))
    for ordered in itertools.permutations(policies):
        pipeline = make()
        with tokentrim.patched(pipeline, ordered) as handle:
            assert torch.allclose(run(pipeline), expected, atol=1e-5)
        acts = handle.report.records[-1].acts
        assert sorted(act["policy"] for act in acts) == ["HidesToken", "HidesToken 2"]
        # One token of each frame, per policy: the first call is made before two frames leave the window.
        assert {act["rows"] for act in acts} == ({4} if policies is TWO else {4, 6})


def test_the_weights_of_two_policies_are_multiplied():
    once, twice = make(), make()
    with tokentrim.patched(once, tokentrim.SoftPrune(0.18, keep=1)):
        expected = run(once)
    policies = [tokentrim.SoftPrune(0.3, keep=1), tokentrim.SoftPrune(0.6, keep=1)]
    with tokentrim.patched(twice, policies):
        assert torch.allclose(run(twice), expected, atol=1e-5)


@pytest.mark.parametrize("policies", [(V, BOTH), (BOTH, V)], ids=["v first", "both first"])
def test_policies_settle_one_after_the_other_and_the_measure_is_what_the_commit_wrote(policies):
    by_hand, pipeline, first = make(ByHand), make(), {}

    def wrote(caches, chunk):
        for layer, cache in enumerate(caches):
            stop = int(cache["local_end_index"])
            for name in ("k", "v"):
                rows = cache[name][:, stop - FRAMES * TOKENS : stop]
                target = first.setdefault((layer, name), rows.clone())
                for policy in policies if chunk else ():
                    if name in policy.of:
                        rows.copy_(moments_moved(rows, (1,), target, policy.strength))

    by_hand.wrote = wrote
    with tokentrim.patched(pipeline, policies) as handle:
        got = run(pipeline)
    assert torch.allclose(got, run(by_hand), atol=3e-5)
    acts = handle.report.records[-1].acts
    assert [act["policy"] for act in acts] == ["RowMoments", "RowMoments 2"]
    assert [act["rows"] for act in acts] == 2 * [2 * FRAMES * TOKENS]


def test_corrections_depend_on_their_order():
    videos = []
    for policies in itertools.permutations([tokentrim.LateMean(3), tokentrim.LatentMoments(0.9)]):
        pipeline = make()
        with tokentrim.patched(pipeline, policies) as handle:
            videos.append(run(pipeline))
        assert [act["policy"] for act in handle.report.records[-1].acts] == [type(p).__name__ for p in policies]
    assert not torch.allclose(*videos, atol=1e-4)


def test_the_record_has_the_moments_of_rows_before_and_after():
    pipeline, seen = make(), []

    @dataclass(frozen=True)
    class Doubles(tokentrim.Policy):
        """Twice the rows, and one more."""

        def settle(self, chunk, rows):
            values = 2 * rows.values + 1
            seen.append((chunk.index, rows.values.double().clone(), values.double()))
            return dataclasses.replace(rows, values=values)

    with tokentrim.patched(pipeline, Doubles()) as handle:
        run(pipeline, chunks=3)
    for record in handle.report:
        (act,) = record.acts
        mine = [pair for index, *pair in seen if index == record.chunk]
        for place, when in enumerate(("before", "after")):
            rows = [pair[place] for pair in mine]
            mean = sum(float(x.mean()) for x in rows) / len(rows)
            std = sum(float(x.std(correction=0)) for x in rows) / len(rows)
            assert act[f"mean_{when}"] == pytest.approx(mean, abs=1e-5)
            assert act[f"std_{when}"] == pytest.approx(std, rel=1e-4)
        assert act["std_after"] == pytest.approx(2 * act["std_before"], rel=1e-4)


def test_two_of_a_class_keep_their_options_and_their_lines_in_the_log(tmp_path):
    pipeline = make()
    policies = [AlwaysPolicy(warmup=1), tokentrim.LatentMoments(0.2), tokentrim.LatentMoments(0.7, channels=(1,)), V]
    with tokentrim.patched(pipeline, policies, observers=[tokentrim.JsonLines(tmp_path)]) as handle:
        run(pipeline)
    report = read_report(tmp_path)
    assert report.settings["policy"] == "AlwaysPolicy + LatentMoments + LatentMoments + RowMoments"
    assert report.settings["policy.LatentMoments.strength"] == 0.2
    assert report.settings["policy.LatentMoments 2.strength"] == 0.7
    acts = report.records[-1].acts
    assert [act["policy"] for act in acts] == ["LatentMoments", "LatentMoments 2", "RowMoments"]
    assert acts[0]["norm"] > 0 and acts[0]["norm"] != acts[1]["norm"] and acts[2]["std_after"] > 0
    assert [record.acts for record in report] == [record.acts for record in handle.report]


@pytest.mark.parametrize("policies", [
    [tokentrim.DriftPolicy(), tokentrim.AdaptivePolicy()], [tokentrim.ObservePolicy(), tokentrim.DriftPolicy()],
], ids=str)  # fmt: skip
def test_two_that_judge_are_refused_in_words_and_the_model_is_left_alone(policies):
    pipeline, names = make(), " and ".join(type(policy).__name__ for policy in policies)
    with pytest.raises(ValueError, match=f"two policies judge a chunk, {names}: give one of them"):
        tokentrim.patch(pipeline, policies)
    assert not tokentrim.is_patched(pipeline) and torch.equal(run(pipeline), run(make()))
