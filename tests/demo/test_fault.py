"""The planted fault touches what it says, and nothing else."""

from dataclasses import replace

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.fault import FAULTS, TOKENS, Blotch, Planter
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.reference.scenes import scenes

AT, FRAMES, TOKENS_A_FRAME = 2, 3, 64
TRUTH = scenes(1, 2, FRAMES * (AT + 4)).video
BLOTCH = Blotch.draw(2, (8, 8), (4, 4), seed=1)
EARLY = {where: replace(fault, healthy=AT - 1) for where, fault in FAULTS.items()}
"""Every fault, planted in chunk AT already."""
ACCEPTED = ("chunk", "settled", "late")
"""Faults that the accepted chunk carries, too."""


class Spy(tokentrim.ObservePolicy):
    """Observes, and keeps the drift of every judged chunk."""

    drifts: list

    def judge(self, chunk, history):
        self.drifts.append(chunk.drift.clone())
        return super().judge(chunk, history)


def roll(fault, chunks=AT, policy=None):
    """Generate ``chunks`` chunks after a given one; returns pipeline, accepted chunks, planted chunks by number."""
    torch.manual_seed(0)
    pipeline = ReferencePipeline.random(grid=(8, 8))
    handle = tokentrim.patch(pipeline, policy) if policy else None
    accepted = []
    with Planter(pipeline.generator, TRUTH, BLOTCH, fault, pipeline.frame_seq_length) as planter:
        pipeline.inference(
            torch.randn(2, FRAMES * chunks, 3, 32, 32),
            initial_latent=TRUTH[:, :FRAMES].clone(),
            on_chunk=lambda i, n, chunk: accepted.append(chunk.clone()),
        )
    if handle:
        handle.unpatch()
    return pipeline, accepted, planter.planted


def drifts(fault):
    """What a policy is shown ``[B, N]`` of every chunk up to the first one behind the fault."""
    spy = Spy()
    object.__setattr__(spy, "drifts", [])
    roll(fault, fault.last + 1, spy)
    return spy.drifts


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


def test_scrambling_puts_unit_noise_into_the_place_other_in_every_pixel_and_video():
    area = BLOTCH.area(32, 32)
    noisy = [BLOTCH.scramble(true(1))[i].permute(0, 2, 3, 1) for i in range(2)]
    for i in range(2):
        assert torch.equal(noisy[i][:, ~area[i]], true(1)[i].permute(0, 2, 3, 1)[:, ~area[i]])
    values = [noisy[i][:, area[i]] for i in range(2)]
    assert all(len(v.unique()) == v.numel() for v in values) and not torch.equal(*values)
    assert all(abs(v.mean()) < 0.15 and 0.9 < v.std() < 1.1 for v in values)  # of 864 values each


def test_a_video_s_blotch_and_noise_are_its_own_seed_s():
    one, other, again = (Blotch.draw(1, (8, 8), (4, 4), seed) for seed in (4, 5, 5))
    both = Blotch.joined([one, other])
    for corrupt in (Blotch.paint, Blotch.scramble):
        assert torch.equal(corrupt(both, true(1))[1:], corrupt(again, true(1)[1:]))
        assert torch.equal(corrupt(both, true(1)), corrupt(both, true(1)))
    same_place = replace(both, corner=torch.zeros(2, 2, dtype=torch.long)).scramble(torch.zeros(2, 3, 3, 32, 32))
    assert not torch.equal(same_place[0], same_place[1])


@pytest.mark.parametrize("where", FAULTS)
def test_only_the_newest_chunks_rows_change(where):
    faulty, _, _ = roll(EARLY[where])
    healthy, _, none = roll(replace(EARLY[where], healthy=AT))
    assert none == {}, "a chunk that is never generated is never corrupted"
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


@pytest.mark.parametrize("where", FAULTS)
def test_what_is_accepted_is_true_up_to_the_fault(where):
    fault = EARLY[where]
    _, accepted, planted = roll(fault, fault.last + 1)
    assert list(planted) == ([AT, AT + 1, AT + 2] if where == "settled" else [AT])
    assert torch.equal(accepted[0], true(1))
    for chunk, corrupted in planted.items():
        assert torch.equal(corrupted, (BLOTCH.scramble if where == "noise" else BLOTCH.paint)(true(chunk)))
        assert torch.equal(accepted[chunk - 1], corrupted if where in ACCEPTED else true(chunk))
    assert not torch.equal(accepted[fault.last], true(fault.last + 1)), "after the fault the model is alone"


@pytest.mark.parametrize("where", ACCEPTED)
def test_a_patch_compares_with_the_true_chunk_or_with_the_corrupted_one(where):
    fault = EARLY[where]
    shown, clean = drifts(fault), drifts(replace(fault, accepted=False))
    assert len(shown) == len(clean) == fault.last + 1
    assert all(torch.equal(shown[chunk - 1], clean[chunk - 1]) for chunk in range(1, AT + 1))
    for chunk in range(AT + 1, fault.last + 2):
        differs = shown[chunk - 1] != clean[chunk - 1]
        for sample in range(2):
            assert set(differs[sample].nonzero().flatten().tolist()) == blotch_tokens(sample)


def test_an_unpatched_model_sees_the_same_in_the_context_and_in_the_chunk():
    (one, context, _), (other, chunk, _) = (roll(EARLY[where], AT + 2) for where in ("context", "chunk"))
    assert not torch.equal(context[AT - 1], chunk[AT - 1])
    assert all(torch.equal(context[i], chunk[i]) for i in (AT, AT + 1))
    for mine, its in zip(one.kv_cache1, other.kv_cache1, strict=True):
        assert all(torch.equal(mine[part], its[part]) for part in ("k", "v"))


def test_the_hook_comes_off():
    pipeline, _, _ = roll(EARLY["chunk"])
    assert not pipeline.generator._forward_pre_hooks
