"""SkyReels-V2 adapter on the real diffusers pipelines, tiny random weights: phases, predecessors, x0, key layout."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from tokentrim_hooks_adapters._skyreels_window import Window, chunk_of

import tokentrim_hooks as tokentrim
from tests.adapters import skyreels_tiny as tiny
from tests.adapters.skyreels_reference import (
    BLOCKS,
    DEAD,
    LONELY,
    SYNC,
    Forced,
    N,
    given,
    picture,
    watched,
)
from tokentrim_hooks import ObservePolicy, Role

FIRST2, FIRST1, ONE = {"first": 1, "refine": 2}, {"first": 1, "refine": 1}, {"first": 1}


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SYNC, [(0, 5, FIRST2), (5, 2, FIRST2), (7, 2, FIRST2)]),
        (BLOCKS, [(0, 2, ONE), (2, 2, ONE), (4, 2, FIRST2), (6, 2, ONE), (8, 2, FIRST2)]),
        (LONELY, [(0, 1, FIRST1), (1, 1, FIRST1), (2, 1, FIRST1), (3, 1, FIRST2), (4, 1, FIRST2)]),
    ],
    ids=["synchronous", "causal-blocks", "asynchronous-no-mask"],
)
def test_phases(settings, expected, scale):
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, ObservePolicy()) as handle:
        tiny.run(pipe, **settings, guidance_scale=scale)
        records = handle.report.records
    assert [(r.start, r.frames, r.phases) for r in records] == expected
    assert [r.severity is None for r in records] == [True] + [False] * (len(expected) - 1)


@pytest.mark.parametrize(
    ("settings", "previous"),
    [(SYNC, {5: (0, 5), 7: (5, 7)}), (BLOCKS, {6: (4, 6)}), (LONELY, {4: (3, 4)})],
    ids=["synchronous", "causal-blocks", "asynchronous-no-mask"],
)
def test_accepted_is_the_previous_chunk_of_the_video_itself(settings, previous):
    pipe, notes = tiny.pipeline(), []
    with tokentrim.patch(pipe, ObservePolicy()) as handle:
        watched(handle, "accepted", notes)
        video = tiny.run(pipe, **settings)
    known = {start: chunk for start, chunk in notes if chunk is not None}
    for start, (begin, end) in previous.items():
        assert torch.equal(known[start], video[:, :, begin:end].transpose(1, 2))


def test_a_finished_block_of_the_same_window_is_accepted_as_it_stands():
    """With ar_step as large as the number of steps, blocks follow each other strictly."""
    settings = {"num_frames": 13, "overlap_history": None, "ar_step": 3, "causal_block_size": 2}
    pipe, accepted, flying = tiny.pipeline(), [], []
    with tokentrim.patch(pipe, ObservePolicy()) as handle:
        watched(handle, "accepted", accepted)
        watched(handle, "in_flight", flying)
        video = tiny.run(pipe, **settings)
    assert [start for start, _ in accepted] == [0, 2] and accepted[0][1] is None
    assert torch.equal(accepted[1][1], video[:, :, :2].transpose(1, 2))
    assert all(chunk is None for _, chunk in flying)


@pytest.mark.parametrize("settings", [SYNC, BLOCKS, LONELY], ids=["synchronous", "causal-blocks", "no-mask"])
def test_x0_is_what_the_scheduler_computes(monkeypatch, settings):
    """Against every frame's own UniPC scheduler, both for the newest chunk and for the one in flight before it."""
    original, computed = UniPCMultistepScheduler.convert_model_output, []

    def noting(self, *args, **kwargs):
        computed.append(original(self, *args, **kwargs))
        return computed[-1]

    predictions: list[Any] = []
    flying: list[Any] = []
    monkeypatch.setattr(UniPCMultistepScheduler, "convert_model_output", noting)
    pipe = tiny.pipeline()
    rows: list[tuple[int, list[torch.Tensor]]] = []

    def after_step(_pipe, _step, _t, tensors):
        rows.append((len(predictions), computed[:]))
        computed.clear()
        return tensors

    with tokentrim.patch(pipe, ObservePolicy()) as handle:
        watched(handle, "prediction", predictions)
        watched(handle, "in_flight", flying)
        tiny.run(pipe, **settings, callback_on_step_end=after_step)
    assert any(chunk is not None for _, chunk in flying) == (settings is not SYNC)
    for count, frames in rows:
        _, x0 = predictions[count - 1]
        newest = torch.stack(frames[-x0.shape[1] :], dim=1)
        torch.testing.assert_close(x0, newest, atol=1e-6, rtol=1e-6)
    _check_flying(flying, rows, predictions)


def _check_flying(flying, rows, predictions):
    for start, chunk in flying:
        if chunk is None:
            continue
        position = next(i for i, (known, _) in enumerate(predictions) if known == start)
        frames = next(frames for count, frames in rows if count > position)
        size = chunk.shape[1]
        torch.testing.assert_close(chunk, torch.stack(frames[-2 * size : -size], dim=1), atol=1e-6, rtol=1e-6)


def test_layout_names_every_key():
    """Roles and frames of the second asynchronous window: the truncated prefix keeps its numbers, no number twice."""
    pipe, layouts = tiny.pipeline(), []
    with tokentrim.patch(pipe, Forced(4)) as handle:
        watched(handle, "context", layouts)
        tiny.run(pipe, **BLOCKS)
    _, layout = layouts[0]
    roles = [(segment.role, list(segment.frames)) for segment in layout.segments]
    assert roles == [(Role.CONTEXT, [3, 4]), (Role.FLIGHT, [6, 7]), (Role.CURRENT, [8, 9])]
    assert layout.length == 6 * N


def test_a_window_that_moves_along_a_long_asynchronous_video():
    """The pipelines' own matrix for 8 frames through a window of 4: rows, roles and slices follow the interval."""
    pipe, count = tiny.pipeline(), 8
    pipe.scheduler.set_timesteps(4)
    given = {"num_latent_frames": count, "step_template": pipe.scheduler.timesteps, "base_num_latent_frames": 4}
    planned = pipe.generate_timestep_matrix(**given, ar_step=2, num_pre_ready=0, causal_block_size=2)
    window = Window([], list(range(count)), 0, True, False, lambda: None)
    window.plan(given, planned, pipe.scheduler.sigmas)
    assert [tuple(block) for block in window.blocks] == [(0, 0, 2), (2, 2, 4), (4, 4, 6), (6, 6, 8)]
    assert window.intervals[4] == (2, 6) and window.intervals[6] == (4, 8)
    assert [window.row(row) for row in window.matrix] == list(range(len(window.matrix)))
    assert window.row(window.matrix[3].clone()) is None
    roles = [[(s.role, list(s.frames)) for s in window.segments(row, 4, 4)] for row in (1, 4, 9)]
    assert roles == [
        [(Role.CURRENT, [0, 1]), (Role.CURRENT, [2, 3])],
        [(Role.FLIGHT, [2, 3]), (Role.CURRENT, [4, 5])],
        [(Role.CONTEXT, [4, 5]), (Role.CURRENT, [6, 7])],
    ]
    frames = torch.arange(2, 6).view(1, 1, 4, 1, 1)
    assert chunk_of(frames, window.blocks[window.newest(4)], window.intervals[4][0]).flatten().tolist() == [4, 5]


def test_the_video_so_far_is_not_kept_alive():
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, ObservePolicy()) as handle:
        tiny.run(pipe, **SYNC)
        gc.collect()
        assert handle.adapter.window.history == list(range(7))
        assert handle.adapter.window.previous() is None


def test_a_given_image_is_an_anchor_and_no_predecessor():
    pipe, layouts = tiny.pipeline("image"), []
    settings = {"image": picture(0), "last_image": picture(1), "num_frames": 13, "overlap_history": None, "ar_step": 1}
    with tokentrim.patch(pipe, Forced(1)) as handle:
        watched(handle, "context", layouts)
        tiny.run(pipe, **settings)
        records = handle.report.records
    assert [r.start for r in records] == [1, 2, 3] and records[0].severity is None and records[1].pruned
    # The second chunk's. Where the process has pruned before, a video's first is asked for as well, to look for marks.
    layout = next(layout for start, layout in layouts if start == 2)
    assert [(segment.role, list(segment.frames)) for segment in layout.segments] == [
        (Role.ANCHOR, [0]),
        (Role.FLIGHT, [1]),
        (Role.CURRENT, [2]),
        (Role.CURRENT, [3]),
        (Role.ANCHOR, [4]),
    ]


def test_a_given_clip_is_the_first_predecessor():
    pipe, accepted = tiny.pipeline("video"), []
    with tokentrim.patch(pipe, Forced(0)) as handle:
        watched(handle, "accepted", accepted)
        video = tiny.run(pipe, video=given("video")["video"])
        record = handle.report.records[0]
    assert (record.start, record.frames, record.pruned, record.dead) == (2, 2, True, 2 * len(DEAD))
    torch.testing.assert_close(accepted[0][1], video[:, :, :2].transpose(1, 2), atol=1e-6, rtol=0)
