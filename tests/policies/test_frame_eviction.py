"""FrameEviction hides what an independent calculation, on the latents of the video itself, says that it must."""

import itertools
import math

import pytest
import torch
from by_hand import FRAMES, TOKENS, ByHand, make, run

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.drift import RunningStatistics
from tokentrim_hooks.rollout.scene import Frames
from tokentrim_hooks.rollout.state import VideoState
from tokentrim_hooks.testing import count_syncs


def cosine(one, other):
    """Of two latent frames of one sample, written out in float64; frames of 8 x 8 are their own summaries."""
    a, b = one.double().flatten(), other.double().flatten()
    return float((a * b).sum() / math.sqrt(float((a * a).sum()) * float((b * b).sum())))


class Evicting(ByHand):
    """Keeps the frames of its own video and says, for each call, which keys are too far from the newest frame."""

    def prepare(self, similarity, keep, sink):
        self.finished, self.seen = [], []

        def answers(x0, step, chunk):
            if step == 3:
                self.finished = [*self.finished[: chunk * FRAMES], *x0.unbind(1)]
            return x0

        def reads(kind, keys):
            # A commit comes when its chunk's frames are finished already, but are no context of its own.
            behind = len(self.finished) - (FRAMES if kind == "commit" else 0)
            context = keys // TOKENS - FRAMES
            sinks = min(sink, context)
            numbers = [None] * sinks + list(range(behind - (context - sinks), behind))
            dead = torch.zeros(2, keys // TOKENS, dtype=torch.bool)
            for place, number in enumerate(numbers[: max(context - keep, 0)]):
                for sample in range(2 if number is not None else 0):
                    likeness = cosine(self.finished[number][sample], self.finished[behind - 1][sample])
                    self.seen.append(likeness)
                    dead[sample, place] = likeness < similarity
            return dead.repeat_interleave(TOKENS, dim=1)

        self.answers, self.reads = answers, reads
        return self


def amid(values):
    """A threshold in the widest gap of the middle half of the values: no rounding moves one across it."""
    ordered = sorted({value for value in values if value < 1 - 1e-6})
    middle = ordered[len(ordered) // 4 : 3 * len(ordered) // 4 + 1]
    low, high = max(itertools.pairwise(middle), key=lambda pair: pair[1] - pair[0])
    return (low + high) / 2


@pytest.mark.parametrize(("keep", "sink"), [(0, 0), (1, 0), (3, 0), (0, 2), (1, 2)])
def test_equals_minus_infinity_at_frames_that_are_too_far_from_the_newest(keep, sink):
    likeness = make(Evicting, sink_size=sink).prepare(-1.0, keep, sink)
    run(likeness)
    similarity = amid(likeness.seen)
    expected = run(make(Evicting, sink_size=sink).prepare(similarity, keep, sink))
    pipeline, plain = make(sink_size=sink), run(make(sink_size=sink))
    with tokentrim.patched(pipeline, tokentrim.FrameEviction(similarity, keep=keep)) as handle:
        got = run(pipeline)
    assert torch.allclose(got, expected, atol=1e-5) and not torch.allclose(got, plain, atol=1e-4)
    assert any(act["hook"] == "hide" for record in handle.report for act in record.acts)
    assert torch.equal(run(pipeline), plain)


def test_it_costs_one_read_per_chunk_and_others_pay_nothing():
    reads = {}
    for policy in (tokentrim.FrameEviction(-1.0), tokentrim.CommitWindow(6)):
        pipeline = make()
        with tokentrim.patched(pipeline, policy), count_syncs() as log:
            run(pipeline, chunks=7)
        reads[type(policy).__name__] = len([sync for sync in log.ours if "scene.py" in sync.place])
    assert reads == {"FrameEviction": 6, "CommitWindow": 0}


def test_frames_that_nobody_saw_are_no_reason_to_hide_anything():
    summaries = torch.stack([torch.full((1, 4), math.nan), -torch.ones(1, 4), torch.ones(1, 4)], dim=1)
    view = tokentrim.ContextView((False,) * 3, TOKENS, summaries)
    place = tokentrim.Place("first", 1, 3, 1, (2, 2))
    policy = tokentrim.FrameEviction(keep=1)
    assert policy.hide(place, view)[0, :, 0].tolist() == [False, True, False]
    unknown = tokentrim.ContextView((False,) * 3, TOKENS, summaries.flip(1))
    assert not policy.hide(place, unknown).any(), "nothing to compare with"
    assert policy.hide(place, tokentrim.ContextView((False,) * 3, TOKENS)) is None


def test_anchors_are_read_unless_they_are_to_be_pruned():
    summaries = torch.tensor([[[-1.0], [-1.0], [1.0]]])
    view, place = tokentrim.ContextView((True, False, False), 4, summaries), tokentrim.Place("first", 1, 3, 1, (2, 2))
    for anchors in (False, True):
        hidden = tokentrim.FrameEviction(keep=1, prune_anchors=anchors).hide(place, view)
        assert hidden[0, :, 0].tolist() == [anchors, True, False]


def test_frames_are_forgotten_once_they_have_left_the_context_and_with_the_scene():
    frames = Frames()
    assert frames.of([0, 1]) is None
    for chunk in range(50):
        frames.add(2 * chunk, torch.full((1, 2, 3, 8, 8), float(chunk)))
        found = frames.of([None, 2 * chunk, 2 * chunk + 1, 2 * chunk + 2])
    assert found[0, :, 0].isnan().tolist() == [True, False, False, True] and found[0, 1, 0] == 49
    assert set(frames.known) == {98, 99} and not frames.waiting
    video = VideoState(0, "a", 1, RunningStatistics.empty(1))
    video.scene.frames = frames
    video.begin_scene()
    assert video.scene.frames.of([98, 99]) is None
