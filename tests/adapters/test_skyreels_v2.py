"""SkyReels-V2 adapter on the real diffusers pipelines, tiny random weights: exact prunes, neutral watching."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers import transformer_skyreels_v2 as upstream

import tokentrim_hooks as tokentrim
from tests.adapters import skyreels_tiny as tiny
from tests.adapters.skyreels_reference import (
    BLOCKS,
    DEAD,
    LONELY,
    SHORT,
    SYNC,
    Forced,
    N,
    block_prune,
    given,
    lonely_prune,
    reference_run,
    sync_prune,
    sync_prune_once,
)
from tests.adapters.video_checks import assert_exact, observed
from tokentrim_hooks import ObservePolicy

EXACT = [
    pytest.param(SYNC, 1, sync_prune, id="synchronous"),
    pytest.param({**SYNC, "guidance_scale": 4.0}, 1, sync_prune, id="guidance"),
    pytest.param({**SYNC, "addnoise_condition": 20}, 1, sync_prune, id="noised-context"),
    pytest.param({**SYNC, "batch": 2}, 1, sync_prune, id="batch"),
    pytest.param(BLOCKS, 2, block_prune, id="causal-blocks"),
    pytest.param({**BLOCKS, "guidance_scale": 4.0}, 2, block_prune, id="causal-blocks-guidance"),
    pytest.param(LONELY, 1, lonely_prune, id="asynchronous-no-mask"),
]


@pytest.mark.parametrize(("settings", "chunk", "hide"), EXACT)
def test_whole_run_equals_attention_with_inf_at_the_dead_keys(monkeypatch, settings, chunk, hide):
    """Replay, guidance branches, later steps and later windows: all as if the tokens had been gone beforehand."""
    expected = reference_run(monkeypatch, hide, **settings)
    batch = settings.get("batch", 1)
    assert_exact(tiny.pipeline(), tiny.run, Forced(chunk), expected, triggers=batch, least=0.01, **settings)


def test_persist_false_revives_after_the_chunk(monkeypatch):
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, Forced(1, persist=False)):
        pruned = tiny.run(pipe, **SYNC)
    once = reference_run(monkeypatch, sync_prune_once, **SYNC)
    torch.testing.assert_close(pruned, once, atol=1e-5, rtol=1e-5)
    forever = reference_run(monkeypatch, sync_prune, **SYNC)
    assert (pruned - forever)[:, :, 7:].abs().max() > 1e-3


def test_only_the_flagged_sample_is_pruned():
    pipe = tiny.pipeline()
    free = tiny.run(pipe, batch=2, **SYNC)
    with tokentrim.patch(pipe, Forced(1, samples=(0,))) as handle:
        pruned = tiny.run(pipe, batch=2, **SYNC)
        assert [(r.sample, r.pruned) for r in handle.report if r.chunk == 1] == [(0, True), (1, False)]
    torch.testing.assert_close(pruned[1], free[1], atol=1e-5, rtol=1e-5)
    assert (pruned[0] - free[0])[:, 5:].abs().max() > 0.01


NEUTRAL = [
    ("text", SYNC),
    ("text", {**SYNC, "guidance_scale": 4.0}),
    ("text", {**SYNC, "addnoise_condition": 20, "batch": 2}),
    ("text", BLOCKS),
    ("text", {**BLOCKS, "guidance_scale": 4.0}),
    ("text", LONELY),
    ("text", SHORT),
    ("image", {}),
    ("image", {"ar_step": 1}),
    ("video", {}),
    ("video", {"ar_step": 1, "causal_block_size": 2, "guidance_scale": 4.0}),
]


@pytest.mark.parametrize(("kind", "settings"), NEUTRAL)
def test_observing_changes_no_bit_and_draws_no_random_number(kind, settings):
    assert observed(tiny.pipeline(kind), tiny.run, **settings, **given(kind))


def test_a_short_video_is_one_chunk_with_nothing_to_judge():
    pipe = tiny.pipeline()
    bare = tiny.run(pipe, **SHORT)
    with tokentrim.patch(pipe, Forced(0)) as handle:
        assert torch.equal(tiny.run(pipe, **SHORT), bare)
        (record,) = handle.report
    assert (record.start, record.frames, record.phases) == (0, 4, {"first": 1, "refine": 2})
    assert record.severity is None and not record.pruned


def poison(hidden: torch.Tensor, columns: range) -> torch.Tensor:
    """Garbage at the latent pixels of the DEAD tokens (grid 4x4, patch 2x2) in some frames of the window."""
    garbage = hidden.clone()
    generator = torch.Generator().manual_seed(0)
    for token in DEAD:
        top, left = 2 * (token // 4), 2 * (token % 4)
        spot = garbage[:, :, columns.start : columns.stop, top : top + 2, left : left + 2]
        spot.copy_(torch.randn(spot.shape, generator=generator) * 50)
    return garbage


@pytest.mark.parametrize(
    ("settings", "chunk", "window", "row", "columns"),
    [(SYNC, 1, 1, 0, range(3)), (SYNC, 1, 1, 2, range(3)), (SYNC, 1, 2, 0, range(1)), (BLOCKS, 2, 0, 4, range(4))],
    ids=["first-row", "last-row", "next-window", "causal-blocks"],
)
@pytest.mark.parametrize("prune", [True, False])
def test_current_chunk_is_bitwise_independent_of_pruned_content(prune, settings, chunk, window, row, columns):
    pipe = tiny.pipeline()
    place, calls, results = {"window": -1}, [], []
    pipe.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)

    def after_step(pipe, step, _t, tensors):
        place["window"] += step == 0
        if (place["window"], step) == (window, row):
            call = calls[-1]
            variants = (call["hidden_states"], poison(call["hidden_states"], columns))
            results.extend(pipe.transformer(**{**call, "hidden_states": hidden})[0] for hidden in variants)
        return tensors

    policy = Forced(chunk) if prune else ObservePolicy()
    with tokentrim.patch(pipe, policy) as handle:
        tiny.run(pipe, **settings, callback_on_step_end=after_step)
        assert handle.report.triggers == int(prune)
    clean, dirty = (output[:, :, columns.stop :] for output in results)
    leak = (clean - dirty)[:, :, -2:].abs().max().item()
    assert torch.equal(clean, dirty) == prune
    assert leak == 0.0 if prune else leak > 0.01


def test_keys_before_and_after(monkeypatch):
    """5 frames x 16 tokens = 80 keys; 3 context frames lose 3 tokens each; both branches of guidance see 71."""
    seen: list[tuple[int, int]] = []
    original = upstream.dispatch_attention_fn

    def counting(query, key, value, **kwargs):
        if query.shape[1] >= 2 * N:
            seen.append((query.shape[1], key.shape[1]))
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(upstream, "dispatch_attention_fn", counting)
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, Forced(1)) as handle:
        tiny.run(pipe, **SYNC, guidance_scale=4.0)
        record = handle.report.records[1]
    keys = [k for q, k in seen if k != 3][:: tiny.LAYERS]
    first = [80] * 6  # window 0: 3 steps of 2 branches
    second = [80, 80, 71, 71] + [71] * 4  # cond, the proof that it can be made twice, its replay, uncond, then 2 steps
    third = [77] * 6  # frame 4 is column 0 now
    assert keys == first + second + third
    assert (record.dead, record.extra_calls, record.regenerations) == (9, 1, 1)


def test_cross_attention_is_never_pruned(monkeypatch):
    original, texts = upstream.dispatch_attention_fn, set()

    def counting(query, key, value, **kwargs):
        if key.shape[1] < N:
            texts.add(key.shape[1])
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(upstream, "dispatch_attention_fn", counting)
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, Forced(1)):
        tiny.run(pipe, **SYNC)
    assert texts == {3}
