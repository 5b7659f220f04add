"""Ten graded inputs, from users' reports: what a policy that judges notices of each, and what it takes for healthy.

``INPUTS`` makes the latents, ``noticed`` runs any policy over them with the rollout's own state, and the table states
what the paper's formula does, shortcomings included: it is what a better policy is to be compared with.
"""

import pytest
import torch
from by_hand import FRAMES, make, run

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.drift import RunningStatistics, latent_summary, token_drift
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.rollout.state import VideoState

CHUNKS = 40
SEEDS = range(8)
MOTION = 0.1
"""Standard deviation of what changes from frame to frame in a healthy video whose latents have that of 1."""


def healthy(seed, chunks=CHUNKS, motion=MOTION):
    """A scene and what moves in it: latents of every chunk, ``[1, 3, 4, 16, 16]``."""
    rng = torch.Generator().manual_seed(seed)
    scene = torch.randn(1, 1, 4, 16, 16, generator=rng)
    return [scene + motion * torch.randn(1, 3, 4, 16, 16, generator=rng) for _ in range(chunks)]


def ramp(seed):
    return [x + 0.01 * i for i, x in enumerate(healthy(seed))]


def gain(seed):
    return [x * 1.03 ** min(i, 6) for i, x in enumerate(healthy(seed))]


def tint(seed):
    step = torch.tensor([0.02, 0, 0, 0]).view(1, 1, 4, 1, 1)
    return [x + step * i for i, x in enumerate(healthy(seed))]


def dim_first_frames(seed):
    dim = torch.tensor([0.8, 1, 1]).view(1, 3, 1, 1, 1)
    return [x * dim if i and i % 6 == 0 else x for i, x in enumerate(healthy(seed))]


def still_then_rounding(seed):
    still = healthy(seed, 1, 0.0)[0]
    rng = torch.Generator().manual_seed(seed)
    return [still + (1e-6 * torch.randn(still.shape, generator=rng) if i >= 20 else 0) for i in range(CHUNKS)]


def loud_chunks(seed):
    return [x * 1.2 if i and i % 7 == 0 else x for i, x in enumerate(healthy(seed))]


def switched(seed):
    return healthy(seed, 10) + healthy(seed + 1000, CHUNKS - 10)


def collapsed(seed):
    constant = torch.full((1, 3, 4, 16, 16), 0.3)
    return [constant if i >= 8 else x for i, x in enumerate(healthy(seed))]


INPUTS = {
    "1 ramp": ramp,
    "2 gain": gain,
    "3 tint": tint,
    "4 dim first frames": dim_first_frames,
    "5 still, then rounding": still_then_rounding,
    "6 loud chunks": loud_chunks,
    "7 switched": switched,
    "8 collapsed": collapsed,
}


def noticed(policy, latents, switches=()):
    """Ordinals of the chunks that ``policy`` flags; a scene begins at each of ``switches``, as the rollout has it."""
    video = VideoState(0, "a", 1, RunningStatistics.empty(1, keep=policy.recalls))
    flagged = []
    for index, x0 in enumerate(latents):
        if index in switches:
            video.begin_scene()
        summary = latent_summary(x0)
        if index:
            first = video.previous if video.first is None else video.first
            view = tokentrim.Chunk(
                "first", index, 3 * index, 3, (8, 8), prediction=x0, summary=summary, previous=video.previous,
                first=first, drift=token_drift(summary, video.previous),
            )  # fmt: skip
            verdict = policy.judge(view, video.history())
            video.statistics = video.statistics.updated(verdict.severity)
            flagged += [index] if bool(verdict.prune) else []
        video.accept(summary)
    return flagged


def rate(make_latents, chunks, switches=(), policy=None):
    """The share of ``chunks`` that a policy flags, the paper's by default, over all seeds."""
    policy = policy or tokentrim.DriftPolicy()
    hits = [noticed(policy, make_latents(seed), switches) for seed in SEEDS]
    return sum(chunk in flagged for flagged in hits for chunk in chunks) / (len(SEEDS) * len(list(chunks)))



EVERY_FRAME = range(3, CHUNKS)
PAPER = [
    # Slow drift makes every step alike, and a threshold over steps follows: no more alarms than in a healthy video.
    ("1 ramp", EVERY_FRAME, 0.0, 0.08),
    ("3 tint", EVERY_FRAME, 0.0, 0.08),
    ("2 gain", range(1, 7), 0.0, 0.35),
    ("2 gain", range(7, CHUNKS), 0.0, 0.08),
    # A sudden change is seen, but it enters the statistics: a periodic one hides its own later occurrences.
    ("4 dim first frames", [6], 0.9, 1.0),
    ("4 dim first frames", [30, 36], 0.0, 0.1),
    ("6 loud chunks", [7, 14], 0.9, 1.0),
    ("6 loud chunks", [28, 35], 0.0, 0.2),
    # The deviation of a still video is 0, and has no floor: rounding noise is taken for a fault (it should not be).
    ("5 still, then rounding", range(20), 0.0, 0.0),
    ("5 still, then rounding", [20, 21, 22], 0.9, 1.0),
    # Nobody has told of the switch.
    ("7 switched", [10], 0.9, 1.0),
    # The fall is seen; a second answer that is no better is accepted, and what stays is never seen again.
    ("8 collapsed", [8], 0.9, 1.0),
    ("8 collapsed", range(9, CHUNKS), 0.0, 0.0),
]


@pytest.mark.parametrize(("name", "chunks", "low", "high"), PAPER)
def test_what_the_papers_formula_notices(name, chunks, low, high):
    assert low <= rate(INPUTS[name], chunks) <= high


ADAPTIVE = [
    # Slow drift leaves the colours of the scene's first chunk behind, further and further: it is seen until the median
    # of severities, and their spread, have followed.
    ("1 ramp", range(7), 0.0, 0.0),
    ("1 ramp", range(10, 24), 0.5, 0.9),
    ("1 ramp", range(32, CHUNKS), 0.0, 0.4),
    ("2 gain", range(5, 8), 0.9, 1.0),
    ("2 gain", range(10, CHUNKS), 0.0, 0.0),
    ("3 tint", range(7), 0.0, 0.0),
    ("3 tint", range(10, 24), 0.5, 0.9),
    # One frame in three of four fifths' contrast is less than what moves here, in every colour: it is not seen, and
    # hides nothing.
    ("4 dim first frames", range(CHUNKS), 0.0, 0.0),
    # A median and robust deviations: a periodic outlier is seen at every one of its occurrences, and hides no other.
    ("6 loud chunks", [7, 14, 21, 28, 35], 0.9, 1.0),
    ("6 loud chunks", [8, 15, 22, 29, 36], 0.9, 1.0),  # and the step back, from the chunk before
    ("6 loud chunks", [n for n in range(CHUNKS) if n % 7 not in (0, 1)], 0.0, 0.0),
    # The floor is a share of the median, which is 0 here, and of a token's size: rounding noise is no fault.
    ("5 still, then rounding", range(CHUNKS), 0.0, 0.0),
    # Nobody has told of the switch: all that follows is new, until it is usual.
    ("7 switched", [10, 11, 12], 0.9, 1.0),
    ("7 switched", range(20, CHUNKS), 0.0, 0.0),
    # What stays is seen as long as it is not usual.
    ("8 collapsed", range(8, 16), 0.9, 1.0),
    ("8 collapsed", range(16, CHUNKS), 0.0, 0.0),
]


@pytest.mark.parametrize(("name", "chunks", "low", "high"), ADAPTIVE)
def test_what_adaptive_policy_notices(name, chunks, low, high):
    assert low <= rate(INPUTS[name], chunks, policy=tokentrim.AdaptivePolicy()) <= high


def test_adaptive_policy_leaves_healthy_videos_and_switches_that_are_told_of_alone():
    policy = tokentrim.AdaptivePolicy()
    assert rate(healthy, range(CHUNKS), policy=policy) == 0
    assert rate(switched, range(CHUNKS), switches=(10,), policy=policy) == 0


def test_a_healthy_video_has_few_alarms_and_these_are_early():
    assert rate(healthy, range(10, CHUNKS)) < 0.06 and rate(healthy, range(3)) == 0


def test_a_switch_that_is_told_of_is_no_fault():
    assert rate(switched, [10, 11, 12], switches=(10,)) == 0


class WithoutCommit(ReferencePipeline):
    """9: a sampler that never calls with clean latents, so that the context holds what the last step wrote."""

    def _call(self, latents, timestep, conditional, start):
        return latents if not timestep.any() else super()._call(latents, timestep, conditional, start)


@pytest.mark.parametrize("policy", [tokentrim.ObservePolicy(), tokentrim.AdaptivePolicy(max_regenerations=0)], ids=str)
def test_9_a_sampler_without_clean_calls_is_judged_chunk_by_chunk_and_left_alone(policy):
    pipeline = make(WithoutCommit)
    with tokentrim.patched(pipeline, policy) as handle:
        assert torch.equal(run(pipeline, chunks=7), run(make(WithoutCommit), chunks=7))
    assert [record.severity is not None for record in handle.report] == 2 * [False] + 12 * [True]


def beyond_the_table(pipeline):
    """10: positions end in the middle of the fourth chunk."""

    def check(module, args, kwargs):
        last = kwargs["current_start"] // pipeline.frame_seq_length + FRAMES
        if last > 7:
            raise IndexError(f"index {last} is out of bounds for dimension 0 with size 7")

    pipeline.generator.register_forward_pre_hook(check, with_kwargs=True)
    return pipeline


def test_10_a_frame_past_the_position_table_fails_as_it_does_unpatched():
    failures = []
    for policy in (None, tokentrim.DriftPolicy(sensitivity=0.0, warmup=1), tokentrim.AdaptivePolicy(warmup=1)):
        pipeline = beyond_the_table(make())
        handle = policy and tokentrim.patch(pipeline, policy)
        with pytest.raises(IndexError) as caught:
            run(pipeline)
        failures.append(str(caught.value))
        if handle:
            notes = [record.notes for record in handle.report]
            assert len(notes) == 4 * 2 and not any(notes[:6]) and "did not come back" in str(notes[-1])
            handle.unpatch()
        assert all(bool(torch.isfinite(layer["v"]).all()) for layer in pipeline.kv_cache1)
    assert failures[0] == failures[1] == failures[2] == "index 8 is out of bounds for dimension 0 with size 7"
