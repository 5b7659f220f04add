"""Long LTX videos, the real diffusers pipeline with tiny random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

sys.path.insert(0, str(Path(__file__).parent))
import ltx_tiny as tiny
from dispatch_tools import watched
from video_checks import (
    Clock,
    assert_exact,
    assert_judged,
    assert_leaves_nothing_behind,
    assert_refuses_a_cache_and_parallelism,
    observed,
    spoilt_input,
)

torch.set_num_threads(1)

TOKENS = [0, 5, 6]
COUNT = 16
OWN = tiny.WINDOW * COUNT
KEYS = OWN + tiny.TAIL * COUNT + COUNT
"""Window, tail, one frame of negative time index."""


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def reference(pipe, guiding=0, anchors=False, tail=tiny.TAIL, **options):
    """The unpatched pipeline with -inf at the dead keys of window 2, in both guidance branches."""
    clock = Clock()

    def hide(keys):
        if clock.chunk != 2 or keys < OWN:
            return None
        line = [False] * OWN + [token in TOKENS for token in range(COUNT)] * tail + [False] * (guiding * COUNT)
        return torch.tensor(line + [anchors and token in TOKENS for token in range(COUNT)])

    with clock.on(pipe), watched(hide):
        return tiny.run(pipe, **options)


@pytest.mark.parametrize("options", [{}, {"cfg": 3.0}, {"cond_image": torch.zeros(1, 3, 128, 128)}])
def test_observing_changes_nothing(pipe, options):
    records = observed(pipe, tiny.run, **options)
    assert [record.phases for record in records] == [{"first": 1, "refine": 2}] * 4
    assert [(record.start, record.frames) for record in records] == [(0, 5), (3, 5), (6, 5), (9, 5)]
    assert [record.severity is None for record in records] == [True, False, False, False]
    assert all(record.grid == (4, 4) for record in records)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_severity_compares_x0_of_two_windows(pipe, cfg):
    """x0 of window 2's first step against window 1's last, conditional branch, by each token's own noise level."""
    seen = []

    def note(module, args, kwargs, output):
        x0 = kwargs["hidden_states"] - kwargs["timestep"] / 1000 * output[0]
        seen.append(x0[-1, :OWN].unflatten(0, (tiny.WINDOW, COUNT)).mean(0))

    hook = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    tiny.run(pipe, cfg=cfg)
    hook.remove()
    assert_judged(pipe, tiny.run, (seen[6] - seen[5]).norm(dim=-1), cfg=cfg)


GUIDED = {"guidance_latents": torch.randn(1, tiny.CHANNELS, 14, 4, 4, generator=torch.Generator().manual_seed(8))}


@pytest.mark.parametrize("anchors", [False, True])
@pytest.mark.parametrize("options", [{}, {"cfg": 3.0}, {"guiding": 3, **GUIDED}])
def test_pruning_equals_minus_infinity_from_the_start_of_the_window(pipe, options, anchors):
    """Both guidance branches, one batch, one verdict; guidance frames are never pruned."""
    expected = reference(pipe, anchors=anchors, **options)
    options = {name: value for name, value in options.items() if name != "guiding"}
    policy = ForcedPolicy({2: TOKENS}, prune_anchors=anchors, persist=not anchors)
    assert_exact(pipe, tiny.run, policy, expected, **options)


def test_key_counts(pipe):
    """80 of the window, 32 of the tail, 16 pinned; three tokens die in both tail frames of window 2 only."""
    with watched() as before:
        tiny.run(pipe, cfg=3.0)
    with watched() as after, tokentrim.patched(pipe, ForcedPolicy({2: TOKENS})):
        tiny.run(pipe, cfg=3.0)
    words = {4}
    assert set(before.keys(KEYS)) - words == {128}
    assert set(after.keys(KEYS)) - words == {128, 122}
    # Two layers, three steps: all of window 2 sees 122 keys after its first call, window 3 sees 128 again.
    assert [keys for queries, keys in after.lengths if queries == KEYS].count(122) == 6


def outputs_of_window_2(pipe, policy, garbage):
    """What the transformer says of window 2's own frames, with ``garbage`` in the flagged tokens of the tail."""
    outputs, clock = [], Clock()

    def spoil(kwargs):
        bad = kwargs["hidden_states"].clone()
        for frame in range(tiny.TAIL if clock.chunk == 2 else 0):
            bad[:, [OWN + frame * COUNT + token for token in TOKENS]] += garbage
        return {"hidden_states": bad}

    def note(module, args, kwargs, output):
        if clock.chunk == 2:
            outputs.append(output[0][:, :OWN].clone())

    with clock.on(pipe), tokentrim.patched(pipe, policy) as handle, spoilt_input(pipe.transformer, spoil):
        hook = pipe.transformer.register_forward_hook(note, with_kwargs=True)
        try:
            tiny.run(pipe, windows=3, cfg=3.0)
        finally:
            hook.remove()
    # A hook sees every call once, also those before anything was pruned: the rejected attempt, and the proof that a
    # call can be made twice.
    unpruned = sum(record.extra_calls + record.proof_calls for record in handle.report if record.sample == 0)
    return torch.stack(outputs[unpruned:])


def test_pruned_content_cannot_be_read(pipe):
    """Bitwise, at every step and in both branches; unpruned it leaks."""
    forced, observed = ForcedPolicy({2: TOKENS}), tokentrim.ObservePolicy()
    assert torch.equal(outputs_of_window_2(pipe, forced, 50.0), outputs_of_window_2(pipe, forced, 0.0))
    leak = outputs_of_window_2(pipe, observed, 50.0) - outputs_of_window_2(pipe, observed, 0.0)
    assert leak.abs().max() > 1e-3


def test_a_tail_of_strength_zero_is_no_context(pipe):
    """Announced by the pipeline but not there: nothing to prune, and said so."""
    options = {"temporal_overlap_cond_strength": 0.0}
    plain = tiny.run(pipe, **options)
    with tokentrim.patched(pipe, ForcedPolicy({2: TOKENS})) as handle:
        assert torch.equal(tiny.run(pipe, **options), plain)
        assert "nothing that may be pruned" in handle.report.records[2].notes[0]


def test_videos_follow_one_another_and_interruption_leaves_nothing_behind(pipe):
    policy = ForcedPolicy({1: TOKENS, 2: 0.2})
    assert_leaves_nothing_behind(pipe, tiny.run, policy, 4, [0, 1, 2, 3, 0, 1, 0, 1, 2, 3])


def test_another_pipeline_of_the_same_code_is_untouched(pipe):
    other = tiny.pipeline(seed=1)
    plain = tiny.run(other)
    with tokentrim.patched(pipe, ForcedPolicy({2: TOKENS})) as handle:
        assert torch.equal(tiny.run(other), plain)
        assert not len(handle.report)


# ---------------------------------------------------------------------------------------------- refusals


def test_refuses_the_transformer_alone(pipe):
    with pytest.raises(tokentrim.UnsupportedModelError, match="ltx-long: not a pipeline"):
        tokentrim.patch(pipe.transformer)


def test_refuses_a_diffusers_cache_and_parallelism():
    pipe = tiny.pipeline()
    assert_refuses_a_cache_and_parallelism(pipe, tiny.run, pipe.transformer.transformer_blocks[0].attn1)
