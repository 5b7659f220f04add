"""FramePack, the real diffusers pipeline with tiny random weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

sys.path.insert(0, str(Path(__file__).parent))
import framepack_tiny as tiny
from dispatch_tools import AllPolicy, dead_keys, poison, watched
from video_checks import (
    Clock,
    assert_exact,
    assert_judged,
    assert_leaves_nothing_behind,
    blocky,
    observed,
    spoilt_input,
)

torch.set_num_threads(1)

VANILLA, INVERTED = "vanilla", "inverted_anti_drifting"
BOTH = pytest.mark.parametrize("sampling", [VANILLA, INVERTED])
TOKENS = [0, 5]
W = tiny.WINDOW
TEXT = 2 + 4
"""Two image keys; of six words the first sample has four."""


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def history(sampling, section, grid):
    """(frames, scale) of the 4x, 2x and 1x history of a section; None is a blank frame."""
    if sampling == VANILLA:
        line = ([None] * 19 + list(range(1 + W * section)))[-19:]
        return [(line[:16], 4), (line[16:18], 2), (line[18:], 1)]
    # The latest section comes first; frames are numbered by section.
    line = ([s * W + f for s in range(section - 1, -1, -1) for f in range(W)] + [None] * 19)[:19]
    return [(line[3:], 4), (line[1:3], 2), (line[:1], 1)]


def hidden(sampling, clock, grid, when, rule="any", anchors=False, samples=None, text=TEXT):
    """Dead keys of a section, by counting: what sections before ``when`` made is dead from ``when`` on."""
    count = grid[0] * grid[1]
    limit = 1 + W * when if sampling == VANILLA else W * when

    def dead(frame):
        return set(TOKENS) if frame < limit else set()

    def hide(keys):
        parts = history(sampling, clock.chunk, grid)
        coarse = dead_keys(parts[:2], grid, dead, rule)
        if keys != len(coarse) + (2 + W) * count + text or clock.chunk < when:
            return None
        pinned = [anchors and token in TOKENS for token in range(count)]
        line = coarse + pinned + dead_keys(parts[2:], grid, dead, rule) + [False] * (W * count + text)
        line = torch.tensor(line)
        return line if samples is None else torch.stack([line & (b in samples) for b in range(2)])

    return hide


def reference(pipe, sampling, when=2, size=(64, 64), rule="any", anchors=False, samples=None, text=TEXT, **options):
    """The unpatched pipeline with -inf at the dead keys from the start of section ``when``."""
    clock = Clock("prepare_latents")
    grid = (size[0] // 16, size[1] // 16)
    with clock.on(pipe), watched(hidden(sampling, clock, grid, when, rule, anchors, samples, text)) as kernel:
        return tiny.run(pipe, sampling=sampling, size=size, **options), kernel


@BOTH
@pytest.mark.parametrize("options", [{}, {"cfg": 2.0}, {"batch": 2}])
def test_observing_changes_nothing(pipe, sampling, options):
    records = observed(pipe, tiny.run, sampling=sampling, **options)
    assert [record.phases for record in records] == [{"first": 1, "refine": 1}] * 4
    assert [record.start for record in records] == ([1, 4, 7, 10] if sampling == VANILLA else [-3, -6, -9, -12])
    assert [record.severity is None for record in records] == [True, False, False, False]


@BOTH
def test_severity_compares_first_x0_with_the_accepted_section(pipe, sampling):
    """By hand: x0 of the third section's first step against the second section as it came out."""
    seen = []

    def note(module, args, kwargs, output):
        sigma = kwargs["timestep"].flatten()[0] / 1000
        seen.append(kwargs["hidden_states"] - sigma * output[0])

    hook = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    video = tiny.run(pipe, sampling=sampling)
    hook.remove()
    before = video[:, :, 4:7] if sampling == VANILLA else video[:, :, 7:10]
    assert_judged(pipe, tiny.run, blocky(seen[4][0].mean(1) - before[0].mean(1)), sampling=sampling)


@BOTH
@pytest.mark.parametrize("rule", ["any", "all"])
@pytest.mark.parametrize("options", [{}, {"cfg": 2.0}, {"size": (80, 48)}, {"sections": 8}])
def test_pruning_equals_minus_infinity_from_the_start_of_the_chunk(pipe, sampling, rule, options):
    """Also: the first step's replay equals pruning before the chunk, both branches agree, dead tokens stay dead."""
    if "cfg" in options:  # the negative prompt has six words: let the positive one have six as well
        options = {**options, "prompt_attention_mask": torch.ones(1, 6)}
    words = 8 if "cfg" in options else TEXT
    expected, _ = reference(pipe, sampling, rule=rule, text=words, **options)
    policy = (ForcedPolicy if rule == "any" else AllPolicy)({2: TOKENS})
    assert_exact(pipe, tiny.run, policy, expected, sampling=sampling, **options)


@BOTH
def test_key_counts(pipe, sampling):
    """64x64 pixels: 4 + 4 coarse keys, 16 pinned, 16 near, 48 of the chunk, 6 of text: 94. Tokens 0 and 5 are dead."""
    with watched() as before:
        tiny.run(pipe, sampling=sampling)
    with watched() as any_rule, tokentrim.patched(pipe, ForcedPolicy({2: TOKENS})):
        tiny.run(pipe, sampling=sampling)
    with watched() as all_rule, tokentrim.patched(pipe, AllPolicy({2: TOKENS})):
        tiny.run(pipe, sampling=sampling)
    with watched() as anchors, tokentrim.patched(pipe, ForcedPolicy({2: TOKENS}, prune_anchors=True)):
        tiny.run(pipe, sampling=sampling)
    assert before.keys(94) == [94]
    # Section 2: one 4x key, one 2x key (tokens 0 and 5 share it), two near keys. Section 3: two 4x keys.
    assert any_rule.keys(94) == [94, 90, 92]
    assert all_rule.keys(94) == [94, 92, 94]
    assert anchors.keys(94) == [94, 88, 90]


@BOTH
def test_tokens_come_back_if_asked(pipe, sampling):
    """Both branches of guidance share one context: the second needs no call of its own."""
    policy = ForcedPolicy({2: TOKENS}, persist=False)
    options = {"sampling": sampling, "cfg": 2.0, "prompt_attention_mask": torch.ones(1, 6)}
    with watched() as kernel, tokentrim.patched(pipe, policy) as handle:
        tiny.run(pipe, **options)
    assert kernel.keys(96) == [96, 92, 96]
    assert handle.report.records[2].extra_calls == 1


@BOTH
def test_pinned_first_frame_is_pruned_on_request_only(pipe, sampling):
    expected, _ = reference(pipe, sampling, anchors=True)
    assert_exact(pipe, tiny.run, ForcedPolicy({2: TOKENS}, prune_anchors=True), expected, sampling=sampling)


@BOTH
def test_one_sample_of_two(pipe, sampling):
    options = {"batch": 2, "sampling": sampling}
    expected, _ = reference(pipe, samples={1}, text=8, **options)
    plain = tiny.run(pipe, **options)
    pruned = assert_exact(pipe, tiny.run, ForcedPolicy({2: TOKENS}, samples=(1,)), expected, **options)
    torch.testing.assert_close(pruned[0], plain[0], atol=1e-5, rtol=1e-5)
    assert (pruned[1] - plain[1]).abs().max() > 1e-3


def poisoned_run(pipe, sampling, policy):
    """Run with garbage in the flagged tokens of all real history frames, at the calls of section 2."""
    clock = Clock("prepare_latents")

    def spoil(kwargs):
        if clock.chunk != 2:
            return {}
        real = range(12, 16) if sampling == VANILLA else range(3)
        frames = {"latents_history_4x": real, "latents_history_2x": range(2), "latents_clean": [1]}
        return {name: poison(kwargs[name], TOKENS, places) for name, places in frames.items()}

    with spoilt_input(pipe.transformer, spoil), clock.on(pipe), tokentrim.patched(pipe, policy):
        return tiny.run(pipe, sampling=sampling, sections=3)


@BOTH
def test_pruned_content_cannot_be_read(pipe, sampling):
    """Bitwise: garbage in the pruned tokens changes nothing of the chunk; with nothing pruned, or "all", it does."""
    new = slice(7, 10) if sampling == VANILLA else slice(1, 4)
    policies = {"any": ForcedPolicy({2: TOKENS}), "all": AllPolicy({2: TOKENS}), "none": tokentrim.ObservePolicy()}
    leak = {}
    for name, policy in policies.items():
        with tokentrim.patched(pipe, policy):
            clean = tiny.run(pipe, sampling=sampling, sections=3)
        leak[name] = float((poisoned_run(pipe, sampling, policy) - clean)[:, :, new].abs().max())
    assert leak["any"] == 0.0
    assert leak["all"] > 1e-3 and leak["none"] > 1e-3


def test_directions_and_videos_follow_one_another(pipe):
    """A second video, in whichever direction, starts afresh: same result as alone, statistics from zero."""
    policy = ForcedPolicy({2: TOKENS})
    alone = {}
    for sampling in (VANILLA, INVERTED):
        with tokentrim.patched(pipe, policy):
            alone[sampling] = tiny.run(pipe, sampling=sampling)
    with tokentrim.patched(pipe, policy) as handle:
        for sampling in (VANILLA, VANILLA, INVERTED, INVERTED, VANILLA):
            assert torch.equal(tiny.run(pipe, sampling=sampling), alone[sampling])
        tiny.run(pipe, sections=1)
        tiny.run(pipe, sections=1)
        records = handle.report.records
    assert [record.video for record in records] == [v for v in range(5) for _ in range(4)] + [5, 6]
    assert [record.chunk for record in records] == [0, 1, 2, 3] * 5 + [0, 0]


def test_interrupted_run_leaves_nothing_behind(pipe):
    policy = ForcedPolicy({1: TOKENS})
    assert_leaves_nothing_behind(pipe, tiny.run, policy, 3, [0, 1, 2, 3, 0, 1, 0, 1, 2, 3])


def test_copy_of_a_patched_pipeline_is_unpatched(pipe):
    plain = tiny.run(pipe)
    with tokentrim.patched(pipe, ForcedPolicy({2: TOKENS})) as handle:
        twin = copy.deepcopy(pipe)
        assert torch.equal(tiny.run(twin), plain)
        assert not len(handle.report)


def test_transformer_alone_is_enough(pipe):
    policy = ForcedPolicy({2: TOKENS})
    with tokentrim.patched(pipe, policy):
        expected = tiny.run(pipe)
    with tokentrim.patched(pipe.transformer, policy) as handle:
        torch.testing.assert_close(tiny.run(pipe), expected, atol=1e-5, rtol=1e-5)
        assert handle.report.triggers == 1
