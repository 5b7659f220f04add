"""The reference model: a rolling cache that equals the forward pass over the whole video."""

import pytest
import torch

from tokentrim_hooks.reference.pipeline import ReferencePipeline

WINDOWS = [
    {},
    {"local_attn_size": 9},
    {"local_attn_size": 9, "sink_size": 3},
    {"local_attn_size": -1},
    {"num_frame_per_block": 1, "local_attn_size": 7, "sink_size": 1},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_cached_chunks_equal_the_pass_over_the_whole_video(window):
    pipeline = ReferencePipeline.random(0, **window)
    rng = torch.Generator().manual_seed(1)
    clean, noisy = torch.randn(2, 2, 30, 3, 16, 16, generator=rng)
    level = torch.full((2, 30), 500)
    with torch.no_grad():
        whole = pipeline.generator(noisy, {}, level, clean_x=clean)[1]
    pipeline.inference(noisy[:, :3])  # makes the cache
    pipeline._reset_caches(noisy, 30)
    size = pipeline.num_frame_per_block
    for start in range(0, 30, size):
        part = slice(start, start + size)
        with torch.no_grad():
            cached = pipeline._call(noisy[:, part], level[:, part], {}, start)
            pipeline._call(clean[:, part], 0 * level[:, part], {}, start)
        torch.testing.assert_close(cached, whole[:, part], atol=1e-4, rtol=0)


def test_sink_rows_survive_eviction_and_others_move():
    pipeline = ReferencePipeline.random(0, local_attn_size=9, sink_size=3)
    noise = torch.randn(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    pipeline.inference(noise)
    before = [layer["k"].clone() for layer in pipeline.kv_cache1]
    zero = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        pipeline._call(noise[:, :3], zero, {}, 9)
    sink = 3 * pipeline.frame_seq_length
    for old, layer in zip(before, pipeline.kv_cache1, strict=True):
        assert torch.equal(layer["k"][:, :sink], old[:, :sink])
        assert torch.equal(layer["k"][:, sink : 2 * sink], old[:, 2 * sink :])
        assert layer["local_end_index"].item() == 3 * sink
        assert layer["global_end_index"].item() == 4 * sink


def test_order_of_calls_and_the_clean_call_gets_the_same_tensor():
    pipeline = ReferencePipeline.random(0)
    calls = []
    pipeline.generator.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs, out[1])), with_kwargs=True
    )
    video = torch.randn(1, 6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    pipeline.inference(video[:, :3], initial_latent=video[:, 3:])
    assert [int(kwargs["timestep"].max()) for kwargs, _ in calls] == [0, 1000, 750, 500, 250, 0]
    assert calls[5][0]["noisy_image_or_video"] is calls[4][1]
    assert [kwargs["current_start"] for kwargs, _ in calls] == [0] + [3 * pipeline.frame_seq_length] * 5


def test_a_second_call_replaces_indices_and_keeps_the_rows():
    pipeline = ReferencePipeline.random(0)
    noise = torch.randn(1, 6, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(pipeline.inference(noise))
        rows, index = pipeline.kv_cache1[0]["k"], pipeline.kv_cache1[0]["local_end_index"]
    pipeline.inference(noise)
    assert torch.equal(*runs)
    assert pipeline.kv_cache1[0]["k"] is rows
    assert pipeline.kv_cache1[0]["local_end_index"] is not index


def test_making_a_random_model_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    ReferencePipeline.random(seed=3)
    assert torch.equal(before, torch.get_rng_state())
