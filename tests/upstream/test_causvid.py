"""The real CausVid, patched: a forced prune equals the -inf reference; long videos of several calls start afresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import OTHERS, TOKENS, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_causvid import Repository, Setup, causvid, pipeline_of
from tiny_self_forcing import source_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy, UnsupportedContextError, UnsupportedModelError

pytestmark = [pytest.mark.upstream, pytest.mark.checks("causvid", "exact")]
Record = Callable[[str, Any], None]


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with causvid() as opened:
        yield opened


def compare(repository: Repository, setup: Setup, chunks: int, prefix: Tensor | None = None) -> Comparison:
    pipeline = pipeline_of(repository, setup)
    noise, prompts = noise_of(setup.batch, chunks * setup.block), ["a cat", "a dog by the sea"][: setup.batch]

    def generate() -> Tensor:
        return pipeline.inference(noise, prompts, start_latents=prefix, return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline))


CASES = {
    "7 chunks, prune at chunk 4": (Setup(), 7, {4: [TOKENS]}),
    "two prunes in one video": (Setup(), 6, {2: [TOKENS], 4: [OTHERS]}),
    "prunes in two successive chunks": (Setup(), 5, {2: [TOKENS], 3: [OTHERS]}),
    "frame by frame": (Setup(block=1), 8, {2: [TOKENS], 6: [OTHERS]}),
    "frame by frame, batch of 2, different tokens": (Setup(1, 2), 5, {2: [TOKENS, ()], 3: [OTHERS, TOKENS]}),
}


def prunes_of(setup: Setup, plan: dict[int, Any], **options: Any) -> list[Prune]:
    return [Prune(chunk * setup.block, tokens, **options) for chunk, tokens in plan.items()]


@pytest.mark.parametrize("name", CASES)
def test_prune_equals_masked_attention(repository: Repository, name: str, record_property: Record) -> None:
    setup, chunks, plan = CASES[name]
    comparison = compare(repository, setup, chunks)
    ours, handle = comparison.patched(ForcedPolicy(plan))
    comparison.exact(f"CausVid, {name}", record_property, ours, comparison.reference(prunes_of(setup, plan)))
    assert handle.adapter.name == "causvid"
    assert pruned_at(handle) == sorted(plan)
    assert trace(handle) == [setup.trace()] * chunks


def test_replay_is_bit_identical_to_pruning_before_the_chunk(repository: Repository) -> None:
    comparison = compare(repository, Setup(), 6)
    ours, _ = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    assert torch.equal(ours, comparison.reference([Prune(12, [TOKENS])], drop=True))
    assert difference(ours, comparison.run()) > VISIBLE


def test_candidate_probe(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository, Setup(), 6)
    ours, handle = comparison.patched(ForcedPolicy({4: [TOKENS]}), probe="candidate")
    comparison.exact("CausVid, probe=candidate", record_property, ours, comparison.reference([Prune(12, [TOKENS])]))
    assert [record.extra_calls for record in handle.report] == [0, 0, 0, 0, 3, 0]


def test_tokens_come_back_without_persist(repository: Repository, record_property: Record) -> None:
    plan, setup = {3: [TOKENS], 4: [OTHERS]}, Setup()
    comparison = compare(repository, setup, 6)
    ours, _ = comparison.patched(ForcedPolicy(plan, persist=False))
    reference = comparison.reference(prunes_of(setup, plan, lasting=False))
    comparison.exact("CausVid, persist=False", record_property, ours, reference)


def test_observing_is_bit_identical(repository: Repository) -> None:
    comparison = compare(repository, Setup(), 5)
    expected, state = comparison.run(), torch.get_rng_state()
    with tokentrim.patch(comparison.model, ObservePolicy()) as handle:
        assert torch.equal(comparison.run(), expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert [record.severity is not None for record in handle.report] == [False, True, True, True, True]


def test_unpatching_restores_everything(repository: Repository) -> None:
    comparison = compare(repository, Setup(), 5)
    expected, native = comparison.run(), repository.attention.attention
    handle = tokentrim.patch(comparison.model, ForcedPolicy({2: [TOKENS]}))
    assert repository.attention.attention is not native
    assert difference(comparison.run(), expected) > VISIBLE
    handle.unpatch()
    assert repository.attention.attention is native
    assert all(bool(layer["v"].isfinite().all()) for layer in comparison.model.kv_cache1)
    assert torch.equal(comparison.run(), expected)


def test_every_call_of_a_long_video_starts_afresh(repository: Repository) -> None:
    """Three overlapping calls: no mark crosses over, statistics start anew, overlap frames are the predecessor."""
    setup = Setup()
    pipeline = pipeline_of(repository, setup)

    def generate() -> list[Tensor]:
        torch.manual_seed(0)
        pieces, overlap = [], None
        for seed in range(3):
            noise = noise_of(1, 12, seed)
            pieces.append(pipeline.inference(noise, ["a cat"], start_latents=overlap, return_latents=True)[1])
            overlap = pieces[-1][:, -3:]
        return pieces

    policy = ForcedPolicy({2: [TOKENS]})
    with tokentrim.patch(pipeline, policy) as handle:
        generate()
    given, denoised = {"first": 1}, setup.trace()
    records = list(handle.report)
    assert [(r.video, r.chunk) for r in records] == [(v, c) for v in range(3) for c in range(4)]
    assert [r.given for r in records] == [False] * 4 + [True, False, False, False] * 2
    assert [r.phases for r in records] == [denoised] * 4 + [given, denoised, denoised, denoised] * 2
    assert [r.chunk for r in records if r.pruned] == [2] * 3
    assert [r.dead for r in records if r.pruned] == [6 * len(TOKENS)] * 3
    assert [r.severity is None for r in records] == [True, False, False, False] * 3


def test_prefix_is_pruned_like_other_frames(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository, Setup(), 5, prefix=noise_of(1, 3, seed=5))
    ours, handle = comparison.patched(ForcedPolicy({2: [TOKENS]}))
    comparison.exact("CausVid, start_latents", record_property, ours, comparison.reference([Prune(6, [TOKENS])]))
    assert pruned_at(handle) == [2]


def test_second_video_starts_afresh(repository: Repository) -> None:
    comparison = compare(repository, Setup(), 5)
    expected = comparison.run()
    policy = ForcedPolicy({2: [TOKENS]})
    with tokentrim.patch(comparison.model, policy) as handle:
        assert difference(comparison.run(), expected) > VISIBLE
        policy.replan({})
        assert torch.equal(comparison.run(), expected)
    assert [record.chunk for record in handle.report] == [*range(5)] * 2


def test_detection_is_unique_and_refuses_the_teacher(repository: Repository) -> None:
    pipeline = pipeline_of(repository, Setup())
    for model in (pipeline, pipeline.generator):
        assert [found.adapter for found in tokentrim.detect(model) if found.matches] == ["causvid"]
    teacher = repository.wrapper.WanDiffusionWrapper()
    with pytest.raises(UnsupportedModelError, match="bidirectional teacher"):
        tokentrim.patch(teacher)


def test_cache_of_a_fork_is_refused(repository: Repository) -> None:
    comparison = compare(repository, Setup(), 5)
    for layer in comparison.model.kv_cache1:
        layer["evicted"] = torch.tensor([0])
    with pytest.raises(UnsupportedContextError, match="evicted"), tokentrim.patched(comparison.model):
        comparison.run()
