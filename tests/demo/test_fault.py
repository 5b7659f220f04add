"""The planted fault touches what it says, and nothing else."""

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.fault import TOKENS, Blotch, Planter
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.reference.scenes import scenes

AT, FRAMES, TOKENS_A_FRAME = 2, 3, 64
TRUTH = scenes(1, 2, FRAMES * (AT + 3)).video
BLOTCH = Blotch.draw(2, (8, 8), (4, 4), seed=1)


class Spy(tokentrim.ObservePolicy):
    """Observes, and keeps the drift of every judged chunk."""

    drifts: list

    def judge(self, chunk, history):
        self.drifts.append(chunk.drift.clone())
        return super().judge(chunk, history)


def roll(at, where, chunks=AT, policy=None):
    """Generate ``chunks`` chunks after a given one; returns pipeline, accepted chunks, planted chunk."""
    torch.manual_seed(0)
    pipeline = ReferencePipeline.random(grid=(8, 8))
    handle = tokentrim.patch(pipeline, policy) if policy else None
    accepted = []
    with Planter(pipeline.generator, TRUTH, BLOTCH, at, pipeline.frame_seq_length, where) as planter:
        pipeline.inference(
            torch.randn(2, FRAMES * chunks, 3, 32, 32),
            initial_latent=TRUTH[:, :FRAMES].clone(),
            on_chunk=lambda i, n, chunk: accepted.append(chunk.clone()),
        )
    if handle:
        handle.unpatch()
    return pipeline, accepted, planter.planted


def true(chunk):
    return TRUTH[:, chunk * FRAMES : (chunk + 1) * FRAMES]


def blotch_tokens(sample):
    row, column = BLOTCH.corner[sample].tolist()
    return {(row + i) * 8 + column + j for i in range(TOKENS[0]) for j in range(TOKENS[1])}


def test_blotch_is_two_by_three_tokens_of_one_pure_colour():
    area = BLOTCH.area(32, 32)
    assert area.flatten(1).sum(1).tolist() == [8 * 12, 8 * 12]
    painted = BLOTCH.paint(true(1))
    for sample in range(2):
        changed = (painted[sample] != true(1)[sample]).any(dim=1)
        assert not changed[:, ~area[sample]].any()
        colors = painted[sample].permute(1, 0, 2, 3)[:, :, area[sample]].flatten(1)
        assert torch.equal(colors, BLOTCH.color[sample][:, None].expand_as(colors))
        assert not torch.equal(BLOTCH.color[sample].abs().sum(), BLOTCH.color[sample].sum().abs()), "black or white"


def test_error_is_that_of_the_place_and_a_margin():
    clean = torch.zeros(2, 3, 3, 32, 32)
    inside = BLOTCH.area(32, 32)[:, None, None].expand_as(clean)
    assert BLOTCH.error(clean + 2.0 * inside, clean, margin=0).tolist() == [4.0, 4.0]
    near = BLOTCH.area(32, 32, margin=1)[:, None, None].expand_as(clean)
    assert BLOTCH.error(clean + 9.0 * ~near, clean).tolist() == [0.0, 0.0]
    share = inside.float().mean((1, 2, 3, 4)) / near.float().mean((1, 2, 3, 4))
    assert torch.allclose(BLOTCH.error(clean + 2.0 * inside, clean), 4 * share)


@pytest.mark.parametrize("where", ["context", "chunk"])
def test_only_the_newest_chunks_rows_change(where):
    faulty, _, _ = roll(AT, where)
    healthy, _, none = roll(AT + 1, where)
    assert none is None, "a chunk that is never generated is never corrupted"
    newest = AT * FRAMES * TOKENS_A_FRAME
    for bad, good in zip(faulty.kv_cache1, healthy.kv_cache1, strict=True):
        assert int(bad["local_end_index"]) == newest + FRAMES * TOKENS_A_FRAME
        for part in ("k", "v"):
            assert torch.equal(bad[part][:, :newest], good[part][:, :newest])
            assert not torch.equal(bad[part][:, newest:], good[part][:, newest:])
    # In the first layer, K and V of a token depend on that token alone.
    first = (faulty.kv_cache1[0]["v"] != healthy.kv_cache1[0]["v"]).flatten(2).any(-1)
    for sample in range(2):
        rows = first[sample].nonzero().flatten().tolist()
        assert {row % TOKENS_A_FRAME for row in rows} <= blotch_tokens(sample)
        assert len(rows) >= FRAMES * 4, "the blotch may by chance cover pixels of its own colour, but not all"


@pytest.mark.parametrize("where", ["context", "chunk"])
def test_what_is_accepted_is_true_up_to_the_fault(where):
    _, accepted, planted = roll(AT, where, chunks=AT + 1)
    assert torch.equal(accepted[0], true(1))
    assert torch.equal(planted, BLOTCH.paint(true(AT)))
    assert torch.equal(accepted[AT - 1], true(AT) if where == "context" else planted)
    assert not torch.equal(accepted[AT], true(AT + 1)), "after the fault the model is alone"


def test_a_patch_compares_with_the_true_chunk_or_with_the_corrupted_one():
    drifts = {}
    for where in ("context", "chunk"):
        spy = Spy()
        object.__setattr__(spy, "drifts", [])
        roll(AT, where, chunks=AT + 1, policy=spy)
        drifts[where] = spy.drifts
    assert [len(found) for found in drifts.values()] == [3, 3]
    for healthy in range(2):
        assert torch.equal(drifts["context"][healthy], drifts["chunk"][healthy])
    differs = drifts["context"][2] != drifts["chunk"][2]
    for sample in range(2):
        assert set(differs[sample].nonzero().flatten().tolist()) == blotch_tokens(sample)


def test_the_hook_comes_off():
    pipeline, _, _ = roll(AT, "chunk")
    assert not pipeline.generator._forward_pre_hooks
