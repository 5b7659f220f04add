"""An answer of `judge` that is no verdict is refused in words, before anything is pruned for it."""

import dataclasses

import pytest
import torch
from by_hand import make, run

import tokentrim_hooks as tokentrim
from tokentrim_hooks.rollout.reading import read


class Answers(tokentrim.Policy):
    """Flags token 0 of every sample, but for the fields that a test replaces."""

    def judge(self, chunk, history):
        batch = len(chunk.drift)
        flat = torch.ones(batch)
        verdict = tokentrim.Verdict(torch.zeros(batch, 1, dtype=torch.long), flat, flat, flat.bool())
        return dataclasses.replace(verdict, **self.fields(chunk)) if self.fields else True

    fields = None


def refused(words, fields=None, **patching):
    """Run a model whose judge answers so; the error must hold ``words``, and the model be whole after it."""
    policy = type("Wrong", (Answers,), {"fields": staticmethod(fields) if fields else None})()
    pipeline = make()
    clean = run(pipeline)
    with pytest.raises(tokentrim.PolicyError, match=words), tokentrim.patched(pipeline, policy, **patching):
        run(pipeline)
    assert torch.equal(run(pipeline), clean)


def test_what_is_no_verdict_is_refused():
    refused(r"Wrong.judge returned bool; return a Verdict, or None")


KINDS = {
    "mask": ("tokens", lambda c: c.drift > 0, r"torch.bool \(2, \d+\) as Verdict.tokens; give a LongTensor \[2, k\]"),
    "list": ("tokens", lambda c: [[0], [0]], r"list as Verdict.tokens"),
    "row": ("tokens", lambda c: torch.zeros(2, dtype=torch.long), r"\(2,\) as Verdict.tokens|outside"),
    "one": ("severity", lambda c: 1.0, r"float as Verdict.severity"),
    "column": ("severity", lambda c: torch.ones(2, 1), r"\(2, 1\) as Verdict.severity"),
    "nothing": ("threshold", lambda c: None, r"NoneType as Verdict.threshold"),
    "short": ("prune", lambda c: torch.ones(1, dtype=torch.bool), r"\(1,\) as Verdict.prune; give a BoolTensor \[2\]"),
    "numbers": ("prune", lambda c: torch.ones(2), r"torch.float32 \(2,\) as Verdict.prune"),
    "negative": ("tokens", lambda c: torch.full((2, 1), -1), r"tokens outside of the patch grid; give indices from 0"),
    "too many": ("tokens", lambda c: torch.full((2, 1), c.drift.shape[1]), r"tokens outside of the patch grid"),
    "nan": ("severity", lambda c: torch.full((2,), torch.nan), r"severity that is not finite"),
    "nan threshold": ("threshold", lambda c: torch.full((2,), torch.nan), r"NaN as threshold"),
}


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
@pytest.mark.parametrize("case", KINDS)
def test_a_field_of_the_wrong_kind_is_refused(case, probe):
    name, value, words = KINDS[case]
    refused(words, lambda chunk: {name: value(chunk)}, probe=probe)


def test_correct_that_returns_no_tensor_is_refused_in_words():
    policy = type("Wrong", (tokentrim.Policy,), {"correct": lambda self, chunk: 5})()
    pipeline = make()
    with pytest.raises(tokentrim.PolicyError, match=r"Wrong.correct returned int"), tokentrim.patched(pipeline, policy):
        run(pipeline)


def test_a_reach_beyond_the_grid_is_the_whole_grid():
    pipeline, severities = make(), []
    for reach in (10**6, 64):
        with tokentrim.patched(pipeline, tokentrim.AdaptivePolicy(reach=reach)) as handle:
            run(pipeline, chunks=4)
        severities.append([record.severity for record in handle.report])
    assert severities[0] == severities[1] and severities[0][-1] is not None


def test_a_channel_that_latents_do_not_have_is_refused_in_words():
    pipeline = make()
    with (
        pytest.raises(tokentrim.UnsupportedPolicyError, match=r"channels \(99,\) of latents with 3"),
        tokentrim.patched(pipeline, tokentrim.LatentMoments(channels=(99,))),
    ):
        run(pipeline)


def test_what_cannot_watch_is_no_observer():
    pipeline = make()
    with pytest.raises(TypeError, match=r"an observer must have on_chunk\(records, latents\), got 3"):
        tokentrim.patch(pipeline, observers=[3])
    assert not tokentrim.is_patched(pipeline)


@pytest.mark.parametrize("words", [r"settle returned int", r"\(1, \d+, \d+, \d+\) as Rows.values; give rows of \(2, "])
def test_settled_rows_of_another_kind_are_refused(words):
    def settle(self, place, rows):
        return 5 if "int" in words else dataclasses.replace(rows, values=rows.values[:1])

    policy, pipeline = type("Wrong", (tokentrim.Policy,), {"settle": settle})(), make()
    with pytest.raises(tokentrim.PolicyError, match=words), tokentrim.patched(pipeline, policy):
        run(pipeline)


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_a_token_named_twice_to_fill_a_row_dies_once(probe):
    def run_with(rows):
        policy = type("Rows", (Answers,), {"fields": staticmethod(lambda chunk: {"tokens": torch.tensor(rows)})})()
        pipeline = make()
        with tokentrim.patched(pipeline, policy, probe=probe) as handle:
            video = run(pipeline)
        return video, [(record.tokens, record.dead, record.regenerations) for record in handle.report]

    once, told_once = run_with([[0, 3], [1, 2]])
    twice, told_twice = run_with([[0, 0, 3, 0], [1, 2, 2, 2]])
    assert torch.equal(once, twice) and told_once == told_twice
    assert any(dead for _, dead, _ in told_once)


@pytest.mark.parametrize("each", [3, 400])
def test_tokens_arrive_as_they_were_named_however_many_they_are(each):
    """Few are made whole numbers by Python, many by torch; the second sample names one of them twice."""
    rng = torch.Generator().manual_seed(each)
    tokens = torch.stack([torch.randperm(1000, generator=rng)[:each] for _ in range(2)])
    tokens[1, 2] = tokens[1, 0]
    severity, prune, flag = torch.tensor([1.5, 2.5]), torch.tensor([True, False]), torch.tensor(True)
    verdict = tokentrim.Verdict(tokens, severity, severity + 1, prune)
    history = tokentrim.History(1, severity - 1, severity)
    drift = torch.rand(2, 1000, generator=rng)
    reading = read(verdict, drift, history, noisy=flag, waiting=[~flag, flag])
    kept = [place for place in range(each) if place != 2]
    assert reading.tokens == [tokens[0].tolist(), tokens[1, kept].tolist()]
    assert (reading.severity, reading.prune) == ([1.5, 2.5], [True, False])
    assert (reading.clean, reading.waiting) == (False, [True, False])
    assert torch.equal(reading.drift, drift.double()) and all(type(token) is int for token in reading.tokens[1])
