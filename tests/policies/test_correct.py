"""What a policy makes of x0 is what the sampler goes on with: against the same arithmetic by hand."""

from dataclasses import dataclass

import pytest
import torch
from by_hand import ByHand, make, moments_moved, run

import tokentrim_hooks as tokentrim

DIMS = (1, 3, 4)


def test_latent_moments_equal_a_calculation_by_hand():
    by_hand, pipeline, opening = make(ByHand), make(), {}

    def answers(x0, step, chunk):
        if step < 3:
            return x0
        opening.setdefault("x0", x0.clone())
        return x0 if chunk == 0 else moments_moved(x0, DIMS, opening["x0"], 0.35)

    by_hand.answers = answers
    with tokentrim.patched(pipeline, tokentrim.LatentMoments(0.35)) as handle:
        got = run(pipeline)
    assert torch.allclose(got, run(by_hand), atol=2e-5)
    acts = [act for record in handle.report for act in record.acts]
    assert {act["hook"] for act in acts} == {"correct"} and all(act["norm"] > 0 for act in acts)
    assert len(acts) == 6 * 2  # of seven chunks and two samples; the first one is the measure


def test_only_the_chosen_channels_are_moved():
    pipeline, seen = make(), []

    @dataclass(frozen=True)
    class Looks(tokentrim.Policy):
        """Keeps what it is shown."""

        def correct(self, chunk):
            moved = tokentrim.LatentMoments(0.5, channels=(1,)).correct(chunk)
            seen.append((chunk.prediction, moved))
            return None

    with tokentrim.patched(pipeline, Looks()):
        run(pipeline, chunks=3)
    for x0, moved in seen:
        assert torch.equal(moved[:, :, [0, 2]], x0[:, :, [0, 2]]) and not torch.equal(moved[:, :, 1], x0[:, :, 1])


@pytest.mark.parametrize("last", [1, 2, 3, 9])
def test_the_late_mean_equals_a_calculation_by_hand(last):
    by_hand, pipeline, late = make(ByHand), make(), []

    def answers(x0, step, chunk):
        late.append(x0)
        if step < 3:
            return x0
        answer = torch.stack(late[-last:]).mean(0)
        late.clear()
        return x0 if chunk == 0 else answer  # before a chunk is complete nobody knows its last step

    by_hand.answers = answers
    with tokentrim.patched(pipeline, tokentrim.LateMean(last)):
        got = run(pipeline)
    assert torch.allclose(got, run(by_hand), atol=1e-5)


def test_policies_correct_one_after_the_other():
    one, two = make(), make()

    @dataclass(frozen=True)
    class Both(tokentrim.Policy):
        """The two by hand."""

        remembers = 2

        def correct(self, chunk):
            mean = tokentrim.LateMean(3).correct(chunk)
            return tokentrim.LatentMoments(0.35).correct(tokentrim.Denoised(**{**vars(chunk), "prediction": mean}))

    with tokentrim.patched(one, [tokentrim.LateMean(3), tokentrim.LatentMoments(0.35)]):
        expected = run(one)
    with tokentrim.patched(two, Both()):
        assert torch.allclose(run(two), expected, atol=1e-6)


@pytest.mark.parametrize("policy", [tokentrim.LatentMoments(0.0), tokentrim.LateMean(1), tokentrim.RowMoments(0.0)])
def test_no_correction_is_bit_neutral(policy):
    pipeline = make()
    with tokentrim.patched(pipeline, policy) as handle:
        assert torch.equal(run(pipeline), run(make()))
    assert not any(record.acts for record in handle.report)


def test_another_shape_is_an_error_that_names_the_policy():
    @dataclass(frozen=True)
    class Wrong(tokentrim.Policy):
        """Answers one frame."""

        def correct(self, chunk):
            return chunk.prediction[:, :1]

    pipeline = make()
    with tokentrim.patched(pipeline, Wrong()), pytest.raises(tokentrim.PolicyError, match=r"Wrong\.correct returned"):
        run(pipeline)
