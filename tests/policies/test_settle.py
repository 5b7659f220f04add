"""Rows that a policy rewrites after a commit equal the same arithmetic on the cache of an unpatched pipeline."""

import pytest
import torch
from by_hand import FRAMES, TOKENS, ByHand, make, moments_moved, run

import tokentrim_hooks as tokentrim


def own_rows(cache):
    stop = int(cache["local_end_index"])
    return slice(stop - FRAMES * TOKENS, stop)


@pytest.mark.parametrize("sink", [0, 2])
@pytest.mark.parametrize("of", [("v",), ("k", "v")])
@pytest.mark.parametrize("reference", ["first", "anchors"])
def test_row_moments_equal_a_calculation_by_hand(sink, of, reference):
    by_hand, pipeline, first = make(ByHand, sink_size=sink), make(sink_size=sink), {}

    def wrote(caches, chunk):
        for layer, cache in enumerate(caches):
            for name in of:
                rows = cache[name][:, own_rows(cache)]
                first.setdefault((layer, name), rows.clone())
                target = first[layer, name] if reference == "first" else cache[name][:, : sink * TOKENS]
                if chunk and target.shape[1]:
                    rows.copy_(moments_moved(rows, (1,), target, 0.35))

    by_hand.wrote = wrote
    expected, plain = run(by_hand), run(make(sink_size=sink))
    with tokentrim.patched(pipeline, tokentrim.RowMoments(0.35, of=of, reference=reference)) as handle:
        got = run(pipeline)
    assert torch.allclose(got, expected, atol=3e-5)
    changes = reference == "first" or sink > 0
    assert torch.allclose(got, plain, atol=1e-4) is not changes
    assert any(act["hook"] == "settle" for record in handle.report for act in record.acts) is changes
    assert torch.equal(run(pipeline), plain)


def test_a_prompt_switch_forgets_the_first_chunk():
    from tokentrim_hooks.adapter import Call
    from tokentrim_hooks.policy.drift import RunningStatistics
    from tokentrim_hooks.rollout.state import VideoState

    call = Call(torch.zeros(1, 1, 1, 2, 2), 0)
    video = VideoState(0, call.stream, 1, RunningStatistics.empty(1))
    video.scene.opening, scene = torch.zeros(1), video.scene
    video.begin_scene()
    assert video.scene is not scene and video.scene.opening is None and not video.scene.moments
