"""Helios, the real diffusers pipelines (classic and modular) with tiny random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

sys.path.insert(0, str(Path(__file__).parent))
import helios_tiny as tiny
from dispatch_tools import AllPolicy, dead_keys, poison, watched
from video_checks import (
    Clock,
    assert_exact,
    assert_judged,
    assert_leaves_nothing_behind,
    assert_refuses_a_cache_and_parallelism,
    blocky,
    observed,
    spoilt_input,
)

torch.set_num_threads(1)

TOKENS = [0, 5]
W = tiny.WINDOW
IMAGE = {
    "image_latents": tiny.noise(1, tiny.CHANNELS, 1, 8, 8, seed=8),
    "fake_image_latents": tiny.noise(1, tiny.CHANNELS, 1, 8, 8, seed=9),
}
VIDEO = {
    "video_latents": tiny.noise(1, tiny.CHANNELS, 6, 8, 8, seed=8),
    "image_latents": tiny.noise(1, tiny.CHANNELS, 1, 8, 8, seed=9),
    "add_noise_to_image_latents": False,
    "add_noise_to_video_latents": False,
}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def hidden(clock, grid, given, when=2, rule="any", anchors=False):
    """Dead keys of a chunk, by counting: frames before chunk ``when`` are dead from it on."""
    count, limit = grid[0] * grid[1], given + W * when

    def hide(keys):
        line = ([None] * 19 + list(range(given + W * clock.chunk)))[-19:]
        parts = [(line[:16], 4), (line[16:18], 2), (line[18:], 1)]

        def dead(frame):
            return set(TOKENS) if frame < limit else set()

        coarse = dead_keys(parts[:2], grid, dead, rule)
        if keys != len(coarse) + (2 + W) * count or clock.chunk < when:
            return None
        pinned = [anchors and token in TOKENS for token in range(count)]
        return torch.tensor(coarse + pinned + dead_keys(parts[2:], grid, dead, rule) + [False] * (W * count))

    return hide


def reference(pipe, run=tiny.run, given=0, size=(64, 64), rule="any", anchors=False, **options):
    """The unpatched pipeline with -inf at the dead keys from the start of chunk 2."""
    clock = Clock()
    with clock.on(pipe), watched(hidden(clock, (size[0] // 16, size[1] // 16), given, 2, rule, anchors)):
        return run(pipe, size=size, **options)


@pytest.mark.parametrize("options", [{}, {"cfg": 2.0, "batch": 2}, IMAGE, VIDEO])
def test_observing_changes_nothing(pipe, options):
    records = observed(pipe, tiny.run, **options)
    given = 6 if options is VIDEO else 1 if options is IMAGE else 0
    assert [record.phases for record in records] == [{"first": 1, "refine": 1}] * 4
    assert [record.start for record in records] == [given, given + 3, given + 6, given + 9]
    # A given video is a predecessor for the first chunk, a given image is not.
    assert [record.severity is None for record in records] == [options is not VIDEO, False, False, False]


def test_severity_compares_first_x0_with_the_accepted_chunk(pipe):
    seen = []

    def note(module, args, kwargs, output):
        seen.append(kwargs["hidden_states"] - kwargs["timestep"].flatten()[0] / 1000 * output[0])

    hook = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    video = tiny.run(pipe)
    hook.remove()
    assert_judged(pipe, tiny.run, blocky(seen[4][0].mean(1) - video[0, :, 3:6].mean(1)))


@pytest.mark.parametrize("rule", ["any", "all"])
@pytest.mark.parametrize(
    "options", [{}, {"cfg": 2.0}, {"size": (80, 48)}, {"given": 1, **IMAGE}, {"given": 6, **VIDEO}]
)
def test_pruning_equals_minus_infinity_from_the_start_of_the_chunk(pipe, rule, options):
    expected = reference(pipe, rule=rule, **options)
    options = {name: value for name, value in options.items() if name != "given"}
    assert_exact(pipe, tiny.run, (ForcedPolicy if rule == "any" else AllPolicy)({2: TOKENS}), expected, **options)


@pytest.mark.parametrize(
    "variant", [{"guidance_cross_attn": False}, {"is_amplify_history": True}, {"zero_history_timestep": False}]
)
def test_variants_of_the_transformer(variant):
    pipe = tiny.pipeline(**variant)
    assert_exact(pipe, tiny.run, ForcedPolicy({2: TOKENS}), reference(pipe))


def test_modular_pipeline():
    """The guider calls conditional and unconditional one after the other; timesteps are whole numbers there."""
    pipe = tiny.modular()
    records = observed(pipe, tiny.run_modular)
    assert [record.phases for record in records] == [{"first": 1, "refine": 1}] * 4
    assert_exact(pipe, tiny.run_modular, ForcedPolicy({2: TOKENS}), reference(pipe, tiny.run_modular))


def test_modular_pipeline_without_a_pinned_frame():
    pipe = tiny.modular()
    options = {"keep_first_frame": False}
    with watched() as before:
        tiny.run_modular(pipe, **options)
    with watched() as after, tokentrim.patched(pipe, ForcedPolicy({2: TOKENS})):
        tiny.run_modular(pipe, **options)
    # Near history is two frames long: 4 + 4 coarse keys, 32 near, 48 of the chunk. Frames 0-5 are dead. Chunk 2: long
    # keys of 0-1, mid of 2-3, short 4 and 5. Chunk 3: long keys of 0 and of 1-4, mid of 5-6.
    assert before.keys(88) == [88]
    assert after.keys(88)[:3] == [88, 88 - 1 - 1 - 4, 88 - 2 - 1]


def test_key_counts(pipe):
    """4 + 4 coarse keys, 16 pinned, 16 near, 48 of the chunk."""
    counts = {}
    policies = {
        "none": tokentrim.ObservePolicy(),
        "any": ForcedPolicy({2: TOKENS}),
        "all": AllPolicy({2: TOKENS}),
        "anchors": ForcedPolicy({2: TOKENS}, prune_anchors=True),
    }
    for name, policy in policies.items():
        with watched() as kernel, tokentrim.patched(pipe, policy):
            tiny.run(pipe, cfg=2.0)
        counts[name] = [keys for keys in kernel.keys(88) if keys > 3]
    assert counts["none"] == [88]
    assert counts["any"] == [88, 84, 86]  # frames 0-5 dead: 4x keys of 0-2, 2x of 3-4, near 5; then 4x of 0-2 and 3-6
    assert counts["all"] == [88, 86, 88]
    assert counts["anchors"] == [88, 82, 84]


def poisoned_run(pipe, policy):
    """Run with garbage in the flagged tokens of all real history frames, at the calls of chunk 2."""
    clock = Clock()

    def spoil(kwargs):
        frames = {"long": [13, 14, 15], "mid": [0, 1], "short": [1]} if clock.chunk == 2 else {}
        names = {part: f"latents_history_{part}" for part in frames}
        return {name: poison(kwargs[name], TOKENS, frames[part]) for part, name in names.items()}

    with spoilt_input(pipe.transformer, spoil), clock.on(pipe), tokentrim.patched(pipe, policy):
        return tiny.run(pipe, chunks=3, cfg=2.0)


def test_pruned_content_cannot_be_read(pipe):
    """Bitwise: garbage in the pruned tokens changes nothing of the chunk; with nothing pruned, or "all", it does."""
    policies = {"any": ForcedPolicy({2: TOKENS}), "all": AllPolicy({2: TOKENS}), "none": tokentrim.ObservePolicy()}
    leak = {}
    for name, policy in policies.items():
        with tokentrim.patched(pipe, policy):
            clean = tiny.run(pipe, chunks=3, cfg=2.0)
        leak[name] = float((poisoned_run(pipe, policy) - clean)[:, :, 6:].abs().max())
    assert leak["any"] == 0.0
    assert leak["all"] > 1e-3 and leak["none"] > 1e-3


def test_pinned_first_frame_is_pruned_on_request_only(pipe):
    policy = ForcedPolicy({2: TOKENS}, prune_anchors=True)
    assert_exact(pipe, tiny.run, policy, reference(pipe, anchors=True))


def test_videos_follow_one_another_and_interruption_leaves_nothing_behind(pipe):
    policy = ForcedPolicy({1: TOKENS, 2: 0.2})
    assert_leaves_nothing_behind(pipe, tiny.run, policy, 3, [0, 1, 2, 3, 0, 1, 0, 1, 2, 3])


def test_refuses_pyramid_stages():
    pipe = tiny.pipeline()
    pipe.scheduler = tiny.scheduler(stages=3)
    with pytest.raises(tokentrim.UnsupportedModelError, match="pyramid stages predict"):
        tokentrim.patch(pipe)


def test_refuses_a_chunk_on_a_smaller_grid_than_its_history(pipe):
    """What a pyramid does with a transformer that was patched by itself."""
    history = torch.zeros(1, tiny.CHANNELS, 16, 8, 8)
    index = torch.arange(32)[None]
    with (
        tokentrim.patched(pipe.transformer),
        pytest.raises(tokentrim.UnsupportedContextError, match="pyramid stages predict"),
    ):
        pipe.transformer(
            hidden_states=torch.zeros(1, tiny.CHANNELS, W, 4, 4),
            timestep=torch.ones(1),
            encoder_hidden_states=torch.zeros(1, 3, tiny.TEXT),
            indices_hidden_states=index[:, 20 : 20 + W],
            indices_latents_history_short=index[:, [0, 19]],
            indices_latents_history_mid=index[:, 17:19],
            indices_latents_history_long=index[:, 1:17],
            latents_history_short=history[:, :, :2],
            latents_history_mid=history[:, :, :2],
            latents_history_long=history,
        )


def test_refuses_a_diffusers_cache_and_parallelism():
    pipe = tiny.pipeline()
    assert_refuses_a_cache_and_parallelism(pipe, tiny.run, pipe.transformer.blocks[1].attn1)
