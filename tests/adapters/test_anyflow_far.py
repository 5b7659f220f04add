"""AnyFlow FAR, the real diffusers pipeline with tiny random weights."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

sys.path.insert(0, str(Path(__file__).parent))
import anyflow_tiny as tiny
from dispatch_tools import AllPolicy, dead_keys
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
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

TOKENS = [0, 5]
STARTS = [0, *accumulate(tiny.PARTITION)]
"""First frames of the chunks: 0, 1, 3, 5, 7 (and 9, the end)."""
WHEN = 2
"""Chunk at which tokens are pruned: frames 0, 1, 2 are its context."""


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@contextmanager
def dense(hide=None):
    """Flex attention by plain softmax over a dense mask, logging keys; ``hide(keys, writes)`` gives dead keys."""
    original, lengths = flex_attention.flex_attention, []

    def attention(query, key, value, score_mod=None, block_mask=None, scale=None, **options):
        batch, _, queries, width = query.shape
        keys = key.shape[2]
        lengths.append((block_mask is not None, keys))
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
        if block_mask is not None:
            seen = flex_attention.create_mask(block_mask.mask_mod, batch, 1, queries, keys, device="cpu")
        dead = hide(keys, block_mask is not None) if hide is not None else None
        if dead is not None:
            own = torch.eye(queries, keys, dtype=torch.bool) & (block_mask is not None)
            seen = seen & (~dead.view(-1, 1, 1, keys) | own)
        scores = query @ key.transpose(-1, -2) * (scale or width**-0.5)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        return weights @ value

    flex_attention.flex_attention = attention
    try:
        yield lengths
    finally:
        flex_attention.flex_attention = original


def hidden(clock, rule="any", samples=None):
    """Dead keys by counting. Read: two chunks in full before the chunk itself; written: two with it."""

    def hide(keys, writes):
        chunk = clock.chunk
        if chunk < WHEN:
            return None
        packed = STARTS[max(chunk + 1 - (2 if writes else 3), 0)]
        small, full = list(range(packed)), list(range(packed, STARTS[chunk + 1]))

        def dead(frame):
            return set(TOKENS) if frame < STARTS[WHEN] else set()

        line = []
        for frame in small:  # one frame a key in time, two by two tokens in space
            line += dead_keys([([frame], 2)], (4, 4), dead, rule)
        line += dead_keys([(full, 1)], (4, 4), dead, rule)
        queries = len(line) if writes else 16 * (STARTS[chunk + 1] - STARTS[chunk])
        line = torch.tensor(line + [False] * (math.ceil(queries / 128) * 128 - queries))
        assert keys == len(line)
        return line if samples is None else torch.stack([line & (b in samples) for b in range(2)])

    return hide


def reference(pipe, rule="any", samples=None, given=0, **options):
    clock = Clock(given=given)
    with clock.on(pipe), dense(hidden(clock, rule, samples)):
        return tiny.run(pipe, **options)


@pytest.mark.parametrize("options", [{}, {"cfg": 2.0}, {"batch": 2}, {"video_latents": tiny.noise(1, 3, 4, 8, 8)}])
def test_observing_changes_nothing(pipe, options):
    records = observed(pipe, tiny.run, **options)
    given = 2 if "video_latents" in options else 0
    assert [record.start for record in records] == STARTS[:-1]
    assert [record.given for record in records] == [True] * given + [False] * (5 - given)
    made = [record.phases for record in records[given:]]
    assert made == [{"first": 1, "refine": 1, "commit": 1}] * (4 - given) + [{"first": 1, "refine": 1}]
    assert [record.severity is None for record in records][0:2] == [True, given == 2]


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_severity_compares_first_estimate_with_the_accepted_chunk(pipe, cfg):
    seen = []

    def note(module, args, kwargs, output):
        if not kwargs["kv_cache_flag"]["is_cache_step"]:
            sigma = kwargs["timestep"].float()[-1, :, None, None, None] / 1000
            seen.append(kwargs["hidden_states"][-1] - sigma * output[0][-1])

    hook = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    video = tiny.run(pipe, cfg=cfg)
    hook.remove()
    drift = blocky(seen[4].mean(0) - video[0, :, 1:3].mean(1))
    assert_judged(pipe, tiny.run, drift, rel=1e-4, cfg=cfg)


@pytest.mark.parametrize("rule", ["any", "all"])
@pytest.mark.parametrize("options", [{}, {"cfg": 2.0}, {"given": 2, "video_latents": tiny.noise(1, 3, 4, 8, 8)}])
def test_pruning_equals_minus_infinity_from_the_start_of_the_chunk(pipe, rule, options):
    """In reading and in writing the cache, full and compressed."""
    expected = reference(pipe, rule, **options)
    options = {name: value for name, value in options.items() if name != "given"}
    assert_exact(pipe, tiny.run, (ForcedPolicy if rule == "any" else AllPolicy)({2: TOKENS}), expected, **options)


def test_one_sample_of_two(pipe):
    expected = reference(pipe, samples={1}, batch=2)
    pruned = assert_exact(pipe, tiny.run, ForcedPolicy({2: TOKENS}, samples=(1,)), expected, batch=2)
    torch.testing.assert_close(pruned[0], tiny.run(pipe, batch=2)[0], atol=1e-5, rtol=1e-5)


def test_key_counts(pipe):
    """Chunk 2 reads 48 keys in full, 32 of its own, 96 padding; chunk 3 four compressed and 64 in full; ..."""
    with dense() as before:
        tiny.run(pipe)
    with dense() as after, tokentrim.patched(pipe, ForcedPolicy({2: TOKENS})):
        tiny.run(pipe)

    def reads(lengths):
        kept = [keys for writes, keys in lengths if not writes]
        return [k for i, k in enumerate(kept) if i == 0 or kept[i - 1] != k]

    assert reads(before) == [128, 144, 176, 196, 204]
    # Chunk 2: two tokens of frames 0-2. Chunk 3: one compressed key, two tokens of frames 1-2. Chunk 4: three keys.
    assert reads(after) == [128, 144, 176, 170, 191, 201]


def spoilt_cache(pipe, policy, garbage):
    """Run with garbage in the cached K and V of the flagged tokens, from the first call of chunk 2 on."""
    clock, spoilt = Clock(), []

    def spoil(kwargs):
        if clock.chunk == 2 and not kwargs["kv_cache_flag"]["is_cache_step"] and not spoilt:
            spoilt.append(True)  # once: a call that adds to the cache each time could not be made twice
            for layer in kwargs["kv_cache"].values():
                for frame in range(3):
                    layer["full_cache"][:, :, :, [frame * 16 + token for token in TOKENS]] += garbage
        return {}

    return _run_with(pipe, policy, clock, spoil)[:, :, 3:5]


def spoilt_writing(pipe, policy, garbage):
    """Run with garbage in the flagged tokens' pixels when the cache is rebuilt after chunk 2."""
    clock = Clock()

    def spoil(kwargs):
        if clock.chunk != 2 or not kwargs["kv_cache_flag"]["is_cache_step"]:
            return {}
        bad = kwargs["hidden_states"].clone()
        for token in TOKENS:
            row, column = 2 * (token // 4), 2 * (token % 4)
            bad[:, :3, :, row : row + 2, column : column + 2] += garbage
        return {"hidden_states": bad}

    return _run_with(pipe, policy, clock, spoil)[:, :, 5:7]


def _run_with(pipe, policy, clock, spoil):
    with spoilt_input(pipe.transformer, spoil), clock.on(pipe), tokentrim.patched(pipe, policy):
        return tiny.run(pipe, cfg=2.0)


@pytest.mark.parametrize("spoilt", [spoilt_cache, spoilt_writing])
def test_pruned_content_cannot_be_read(pipe, spoilt):
    """Bitwise: neither from the cache nor through what its neighbours become when the cache is rebuilt."""
    forced, observed = ForcedPolicy({2: TOKENS}), tokentrim.ObservePolicy()
    assert torch.equal(spoilt(pipe, forced, 50.0), spoilt(pipe, forced, 0.0))
    assert (spoilt(pipe, observed, 50.0) - spoilt(pipe, observed, 0.0)).abs().max() > 1e-3


def test_tokens_come_back_if_asked(pipe):
    """persist=False: chunk 2 is made without them, what follows with them; the cache is rebuilt in full."""
    forced = ForcedPolicy({2: TOKENS})
    with tokentrim.patched(pipe, forced):
        kept = tiny.run(pipe)
    with dense() as lengths, tokentrim.patched(pipe, ForcedPolicy({2: TOKENS}, persist=False)):
        back = tiny.run(pipe)
    torch.testing.assert_close(back[:, :, :5], kept[:, :, :5], atol=1e-5, rtol=1e-5)
    assert [keys for writes, keys in lengths if not writes][-1] == 204


def test_videos_follow_one_another_and_interruption_leaves_nothing_behind(pipe):
    policy = ForcedPolicy({1: TOKENS, 2: 0.2})
    assert_leaves_nothing_behind(pipe, tiny.run, policy, 4, [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4])


def test_videos_of_other_lengths_follow_one_another(pipe):
    with tokentrim.patched(pipe, ForcedPolicy({1: TOKENS})) as handle:
        for partition in (tiny.PARTITION, [2, 1], [2, 1]):
            tiny.run(pipe, chunk_partition=partition)
        chunks = [(record.video, record.chunk) for record in handle.report]
    assert chunks == [*((0, chunk) for chunk in range(5)), (1, 0), (1, 1), (2, 0), (2, 1)]


# ---------------------------------------------------------------------------------------------- refusals


def test_refuses_the_transformer_alone_and_parallelism(pipe):
    with pytest.raises(tokentrim.UnsupportedModelError, match="anyflow-far: not a pipeline"):
        tokentrim.patch(pipe.transformer)
    twin = tiny.pipeline()
    twin.transformer.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(tokentrim.UnsupportedModelError, match="context parallelism"):
        tokentrim.patch(twin)
