"""What a policy may not do, and is told by name: write into what it is shown, or give numbers that are not finite."""

import dataclasses

import pytest
import torch
from by_hand import make, run

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import count_syncs


class Harms(tokentrim.Policy):
    """Writes over what it is shown."""

    def judge(self, chunk, history):
        chunk.prediction.mul_(3)


class HarmsByDrift(tokentrim.Policy):
    def judge(self, chunk, history):
        chunk.drift.zero_()


class HarmsX0(tokentrim.Policy):
    def correct(self, chunk):
        chunk.prediction.add_(1)


class HarmsNoise(tokentrim.Policy):
    def guide(self, chunk):
        chunk.latents.add_(1)


HARMFUL = [(Harms, "judge"), (HarmsByDrift, "judge"), (HarmsX0, "correct"), (HarmsNoise, "guide")]


@pytest.mark.parametrize(("kind", "hook"), HARMFUL, ids=lambda part: getattr(part, "__name__", part))
def test_writing_into_what_is_shown_is_refused(kind, hook):
    words = rf"{kind.__name__}\.{hook} has written into what it was shown.*\n.*clone"
    pipeline = make()
    plain = run(pipeline)
    with pytest.raises(tokentrim.PolicyError, match=words), tokentrim.patched(pipeline, kind()):
        run(pipeline)
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("kind", [Harms, HarmsX0])
def test_in_inference_mode_it_harms_a_copy_only(kind):
    """Such tensors count no writes."""
    with torch.inference_mode():
        pipeline = make()
        plain = run(pipeline, chunks=2)
        with tokentrim.patched(pipeline, kind()):
            assert torch.equal(run(pipeline, chunks=2), plain)


class NanX0(tokentrim.Policy):
    def correct(self, chunk):
        return chunk.prediction * torch.nan


class NanNoise(tokentrim.Policy):
    def guide(self, chunk):
        return chunk.latents / 0


class NanRows(tokentrim.Policy):
    def settle(self, place, rows):
        return dataclasses.replace(rows, values=rows.values.clone().fill_(torch.nan)) if rows.layer else None


class NanKeys(tokentrim.Policy):
    def settle(self, place, rows):
        return dataclasses.replace(rows, keys=rows.keys.clone().fill_(torch.inf))


NOT_FINITE = [(NanX0, "correct"), (NanNoise, "guide"), (NanRows, "settle"), (NanKeys, "settle")]
each_not_finite = pytest.mark.parametrize(("kind", "hook"), NOT_FINITE, ids=[kind.__name__ for kind, _ in NOT_FINITE])


@each_not_finite
def test_numbers_that_are_not_finite_are_told_by_the_policy_s_name(kind, hook):
    """Nothing judges here, so nothing else would notice."""
    pipeline = make()
    plain = run(pipeline)
    words = rf"{kind.__name__}\.{hook} gave numbers that are not finite for the chunk at latent frame"
    with pytest.raises(tokentrim.PolicyError, match=words), tokentrim.patched(pipeline, kind()):
        run(pipeline)
    assert torch.equal(run(pipeline), plain)


@each_not_finite
def test_with_warn_the_run_goes_on(kind, hook):
    said = pytest.warns(tokentrim.TokenTrimWarning, match=rf"{kind.__name__}\.{hook} gave numbers")
    pipeline = make()
    with said, tokentrim.patched(pipeline, kind(), on_error="warn"):
        run(pipeline)


def test_what_policies_did_is_read_once_a_chunk():
    """Both samples' records, and two policies, wait for the device once."""
    pipeline, chunks = make(), 4
    two = [tokentrim.LatentMoments(0.3), tokentrim.LatentMoments(0.2)]
    with tokentrim.patched(pipeline, two) as handle, count_syncs() as log:
        run(pipeline, chunks=chunks)
    reads = [event for event in log.events if event.ours and "records" in event.place]
    acted = {record.chunk for record in handle.report if record.acts}
    assert acted and len(reads) == len(acted)
