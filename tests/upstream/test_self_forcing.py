"""The real Self-Forcing, patched: a forced prune equals the -inf reference in its few-step loop's configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import OTHERS, TOKENS, TOLERANCE, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import MaskedReference, Prune
from tiny_self_forcing import FOUR_STEPS, Repository, Setup, few_step_pipeline, self_forcing, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim

pytestmark = [pytest.mark.upstream, pytest.mark.checks("self-forcing", "exact")]
Record = Callable[[str, Any], None]

GIVEN = {"first": 1}


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with self_forcing() as opened:
        yield opened


def compare(
    repository: Repository, setup: Setup, frames: int, prefix: Tensor | None = None, generator: bool = False
) -> Comparison:
    """A pipeline of ``setup``, its noise of ``frames``; patches the generator instead of the pipeline on demand."""
    pipeline = few_step_pipeline(repository, setup)
    noise, prompts = noise_of(setup.batch, frames), (["a cat", "a dog by the sea"] * 2)[: setup.batch]

    def generate() -> Tensor:
        _, latents = pipeline.inference(noise, prompts, initial_latent=prefix, return_latents=True)
        return latents

    model = pipeline.generator if generator else pipeline
    return Comparison(generate, model, source_of(repository, pipeline), setup.spared())


WINDOWS = {
    "global window, 7 chunks of 4 steps": (Setup(steps=FOUR_STEPS), 7, [4]),
    "global window, 12 chunks, prune beyond 21 frames": (Setup(), 12, [9]),
    "global window, 12 chunks, prune before the limit": (Setup(), 12, [4]),
    "local 9 sink 0, prune before eviction": (Setup(window=9), 6, [2]),
    "local 9 sink 0, prune at the first eviction": (Setup(window=9), 6, [3]),
    "local 9 sink 0, prune after eviction": (Setup(window=9), 7, [5]),
    "local 9 sink 3, prune before eviction": (Setup(window=9, sink=3), 6, [2]),
    "local 9 sink 3, prune after eviction, 4 steps": (Setup(window=9, sink=3, steps=FOUR_STEPS), 7, [5]),
    "local 9 sink 1, prune after eviction": (Setup(window=9, sink=1), 7, [5]),
    "frame by frame, local 5 sink 1": (Setup(window=5, sink=1, block=1), 9, [3, 7]),
    "frame by frame, global window": (Setup(block=1), 8, [1, 6]),
    "two prunes in one video, global window": (Setup(), 7, [2, 5]),
    "two prunes in one video, local 9 sink 3": (Setup(window=9, sink=3), 7, [3, 5]),
    "prunes in two successive chunks, local 9 sink 0": (Setup(window=9), 7, [4, 5]),
}


def plans(chunks: list[int], block: int) -> tuple[dict[int, Any], list[Prune]]:
    """The same prunes for the policy (by chunk) and for the reference (by frame); the second takes other tokens."""
    tokens = [TOKENS, OTHERS]
    forced = {chunk: [tokens[i]] for i, chunk in enumerate(chunks)}
    return forced, [Prune(chunk * block, [tokens[i]]) for i, chunk in enumerate(chunks)]


@pytest.mark.parametrize("name", WINDOWS)
def test_prune_equals_masked_attention(repository: Repository, name: str, record_property: Record) -> None:
    setup, chunks, where = WINDOWS[name]
    forced, prunes = plans(where, setup.block)
    comparison = compare(repository, setup, chunks * setup.block)
    ours, handle = comparison.patched(ForcedPolicy(forced))
    comparison.exact(name, record_property, ours, comparison.reference(prunes))
    assert pruned_at(handle) == where
    assert trace(handle) == [setup.trace()] * chunks


@pytest.mark.parametrize("setup", [Setup(), Setup(window=9), Setup(window=9, sink=3)], ids=["global", "local", "sink"])
def test_replay_is_bit_identical_to_pruning_before_the_chunk(repository: Repository, setup: Setup) -> None:
    comparison = compare(repository, setup, 18)
    ours, _ = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    assert torch.equal(ours, comparison.reference([Prune(12, [TOKENS])], drop=True))
    assert difference(ours, comparison.run()) > VISIBLE


def test_reference_masks_what_bookkeeping_says(repository: Repository) -> None:
    """The reference finds dead keys by their bits; here their number is counted from the window's geometry."""
    setup = Setup(window=9, sink=1)
    comparison = compare(repository, setup, 18)
    with MaskedReference(comparison.source, [Prune(12, [TOKENS])], setup.spared()) as reference:
        comparison.run()
    calls = [reference.masked[i : i + 9] for i in range(0, len(reference.masked), 9)]
    # Chunk 4 sees the sink and frames 7 to 11, of which the five are dead; chunk 5 sees 10 to 14: two are left.
    assert [{count for (count,) in chunk} for chunk in calls] == [{0}, {0}, {0}, {0}, {5 * 8}, {2 * 8}]


def test_sink_is_spared_unless_asked(repository: Repository, record_property: Record) -> None:
    setup = Setup(window=9, sink=3)
    comparison = compare(repository, setup, 18)
    spared, _ = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    ours, handle = comparison.patched(ForcedPolicy({4: [TOKENS]}, prune_anchors=True))
    reference = comparison.reference([Prune(12, [TOKENS])], spared=())
    comparison.exact("local 9 sink 3, prune_anchors=True", record_property, ours, reference)
    assert difference(spared, ours) > VISIBLE
    assert [record.dead for record in handle.report if record.pruned] == [6 * len(TOKENS)]


def test_only_the_flagged_sample_is_pruned(repository: Repository, record_property: Record) -> None:
    setup = Setup(window=9, sink=3, batch=2)
    comparison = compare(repository, setup, 18)
    ours, handle = comparison.patched(ForcedPolicy({4: [(), TOKENS]}))
    reference = comparison.reference([Prune(12, [(), TOKENS])])
    comparison.exact("batch of 2, second sample pruned", record_property, ours, reference)
    assert difference(ours[0], comparison.run()[0]) <= 2e-6
    assert (pruned_at(handle, 0), pruned_at(handle, 1)) == ([], [4])


def test_samples_pruned_of_different_tokens(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository, Setup(window=9, batch=2), 18)
    ours, _ = comparison.patched(ForcedPolicy({2: [TOKENS, ()], 4: [OTHERS, TOKENS]}))
    reference = comparison.reference([Prune(6, [TOKENS, ()]), Prune(12, [OTHERS, TOKENS])])
    comparison.exact("batch of 2, different tokens", record_property, ours, reference)


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
@pytest.mark.parametrize(
    ("flagged", "parts"), [({2}, [1]), ({1, 2}, [2]), ({0, 3}, [1, 1])], ids=["one", "neighbours", "apart"]
)
def test_flagged_samples_are_called_alone(
    repository: Repository, record_property: Record, flagged: set[int], parts: list[int], probe: Any
) -> None:
    """Twice at first, for the proof, then alone: as -inf at their dead keys, in a cache that rolls."""
    setup = Setup(window=9, sink=3, batch=4)
    comparison = compare(repository, setup, 18)
    first, second = ([chosen if n in flagged else () for n in range(4)] for chosen in (TOKENS, OTHERS))
    batches: list[int] = []
    hook = comparison.model.generator.register_forward_pre_hook(
        lambda _module, _args, kwargs: batches.append(len(kwargs["noisy_image_or_video"])), with_kwargs=True
    )
    ours, _ = comparison.patched(ForcedPolicy({3: first, 5: second}), probe=probe)
    hook.remove()
    reference = comparison.reference([Prune(9, first), Prune(15, second)])
    comparison.exact(f"batch of 4, {len(flagged)} flagged, {probe}", record_property, ours, reference)
    steps = len(setup.steps) if probe == "candidate" else 1
    assert [size for size in batches if size < 4] == 2 * steps * parts
    assert batches.count(4) == 6 * sum(setup.trace().values()) + 2 * steps, "proved twice, regenerated once"


def test_given_prefix(repository: Repository, record_property: Record) -> None:
    setup = Setup(window=9)
    comparison = compare(repository, setup, 12, prefix=noise_of(1, 6, seed=5))
    ours, handle = comparison.patched(ForcedPolicy({2: [TOKENS], 4: [OTHERS]}))
    reference = comparison.reference([Prune(6, [TOKENS]), Prune(12, [OTHERS])])
    comparison.exact("initial_latent of two chunks", record_property, ours, reference)
    assert trace(handle) == [GIVEN, GIVEN, *[setup.trace()] * 4]
    assert [record.given for record in handle.report] == [True, True, False, False, False, False]


def test_prefix_with_an_independent_first_frame(repository: Repository, record_property: Record) -> None:
    setup = Setup(independent_first=True)
    comparison = compare(repository, setup, 9, prefix=noise_of(1, 4, seed=5))
    ours, handle = comparison.patched(ForcedPolicy({3: [TOKENS]}))
    reference = comparison.reference([Prune(7, [TOKENS])])
    comparison.exact("initial_latent, independent first frame", record_property, ours, reference)
    assert [(record.start, record.frames) for record in handle.report] == [(0, 1), (1, 3), (4, 3), (7, 3), (10, 3)]
    assert trace(handle) == [GIVEN, GIVEN, *[setup.trace()] * 3]


@pytest.mark.parametrize("setup", [Setup(independent_first=True), Setup(window=9, sink=1, independent_first=True)])
def test_independent_first_frame(repository: Repository, setup: Setup, record_property: Record) -> None:
    comparison = compare(repository, setup, 16)
    ours, handle = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    reference = comparison.reference([Prune(10, [TOKENS])])
    comparison.exact(f"independent first frame, window {setup.window}", record_property, ours, reference)
    assert [record.frames for record in handle.report] == [1, 3, 3, 3, 3, 3]
    assert trace(handle) == [setup.trace()] * 6


def test_second_video_starts_afresh(repository: Repository) -> None:
    """Marks of the first video are gone in the second, and its statistics start again."""
    comparison = compare(repository, Setup(window=9), 18)
    fresh, _ = compare(repository, Setup(window=9), 18).patched(ForcedPolicy({4: [OTHERS]}))
    policy = ForcedPolicy({4: [TOKENS]})
    with tokentrim.patch(comparison.model, policy) as handle:
        first = comparison.run()
        policy.replan({4: [OTHERS]})
        second = comparison.run()
        assert not all(bool(layer["v"].isfinite().all()) for layer in cache_of(comparison))
        policy.replan({})
        third = comparison.run()
    assert torch.equal(second, fresh)
    assert torch.equal(third, comparison.run())
    assert difference(first, second) > VISIBLE
    assert [record.chunk for record in handle.report] == [*range(6)] * 3
    assert all(bool(layer["v"].isfinite().all()) for layer in cache_of(comparison))


def cache_of(comparison: Comparison) -> list[dict[str, Tensor]]:
    """The pipeline's KV cache."""
    return comparison.model.kv_cache1


def test_the_generator_alone_can_be_patched(repository: Repository) -> None:
    whole, _ = compare(repository, Setup(window=9), 18).patched(ForcedPolicy({4: [TOKENS]}))
    alone, handle = compare(repository, Setup(window=9), 18, generator=True).patched(ForcedPolicy({4: [TOKENS]}))
    assert torch.equal(whole, alone)
    assert pruned_at(handle) == [4]


CANDIDATES = {
    "global window": (Setup(), 4),
    "local 9 sink 0, 4 steps": (Setup(window=9, steps=FOUR_STEPS), 4),
    "local 9 sink 3": (Setup(window=9, sink=3), 3),
    "second chunk": (Setup(), 1),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidate_probe_regenerates_the_whole_chunk(
    repository: Repository, name: str, record_property: Record
) -> None:
    setup, chunk = CANDIDATES[name]
    comparison = compare(repository, setup, 18)
    ours, handle = comparison.patched(ForcedPolicy({chunk: [TOKENS]}), probe="candidate")
    reference = comparison.reference([Prune(3 * chunk, [TOKENS])])
    comparison.exact(f"probe=candidate, {name}", record_property, ours, reference)
    assert trace(handle) == [setup.trace()] * 6
    assert [record.extra_calls for record in handle.report] == [len(setup.steps) * (i == chunk) for i in range(6)]


def test_candidate_probe_spares_the_other_sample(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository, Setup(window=9, batch=2), 18)
    ours, _ = comparison.patched(ForcedPolicy({4: [TOKENS, ()]}), probe="candidate")
    reference = comparison.reference([Prune(12, [TOKENS, ()])])
    comparison.exact("probe=candidate, batch of 2", record_property, ours, reference)
    assert difference(ours[1], comparison.run()[1]) <= 2e-6


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
@pytest.mark.parametrize("setup", [Setup(), Setup(window=9), Setup(window=9, sink=3)], ids=["global", "local", "sink"])
def test_tokens_come_back_without_persist(
    repository: Repository, setup: Setup, probe: str, record_property: Record
) -> None:
    comparison = compare(repository, setup, 18)
    ours, _ = comparison.patched(ForcedPolicy({3: [TOKENS], 4: [OTHERS]}, persist=False), probe=probe)
    prunes = [Prune(9, [TOKENS], lasting=False), Prune(12, [OTHERS], lasting=False)]
    name = f"persist=False, {probe}, window {setup.window} sink {setup.sink}"
    comparison.exact(name, record_property, ours, comparison.reference(prunes))
    kept, _ = comparison.patched(ForcedPolicy({3: [TOKENS], 4: [OTHERS]}), probe=probe)
    assert difference(ours, kept) > 10 * TOLERANCE
