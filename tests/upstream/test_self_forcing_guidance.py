"""Self-Forcing's guided pipeline: two caches, several solver steps; both caches are pruned, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import OTHERS, TOKENS, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import MaskedReference, Prune
from tiny_self_forcing import Repository, Setup, guided_pipeline, self_forcing, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy, UnsupportedProbeError

pytestmark = pytest.mark.upstream
Record = Callable[[str, Any], None]
STEPS = 3


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with self_forcing() as opened:
        yield opened


def compare(repository: Repository, setup: Setup, frames: int, prefix: Tensor | None = None) -> Comparison:
    pipeline = guided_pipeline(repository, setup, STEPS)
    noise, prompts = noise_of(setup.batch, frames), ["a cat", "a dog by the sea"][: setup.batch]

    def generate() -> Tensor:
        _, latents = pipeline.inference(noise, prompts, initial_latent=prefix, return_latents=True)
        return latents

    return Comparison(generate, pipeline, source_of(repository, pipeline), setup.spared())


GUIDED = {
    "guidance, global window": (Setup(), 5, [3]),
    "guidance, local 9 sink 0, prune at the first eviction": (Setup(window=9), 5, [3]),
    "guidance, local 9 sink 3, two prunes": (Setup(window=9, sink=3), 6, [3, 5]),
    "guidance, frame by frame, local 5": (Setup(window=5, block=1), 7, [2, 6]),
}


@pytest.mark.parametrize("persist", [True, False], ids=["persist", "revive"])
@pytest.mark.parametrize("name", GUIDED)
def test_both_caches_are_pruned(repository: Repository, name: str, persist: bool, record_property: Record) -> None:
    setup, chunks, where = GUIDED[name]
    tokens = dict(zip(where, (TOKENS, OTHERS), strict=False))
    comparison = compare(repository, setup, chunks * setup.block)
    ours, handle = comparison.patched(ForcedPolicy({c: [t] for c, t in tokens.items()}, persist=persist))
    prunes = [Prune(c * setup.block, [t], lasting=persist) for c, t in tokens.items()]
    label = name if persist else f"{name}, revived"
    comparison.exact(label, record_property, ours, comparison.reference(prunes))
    assert pruned_at(handle) == where


@pytest.mark.parametrize("persist", [True, False], ids=["persist", "revive"])
def test_bit_identical_to_pruning_before_the_chunk(repository: Repository, persist: bool) -> None:
    comparison = compare(repository, Setup(window=9, sink=3), 15)
    ours, _ = comparison.patched(ForcedPolicy({3: [TOKENS]}, persist=persist))
    assert torch.equal(ours, comparison.reference([Prune(9, [TOKENS], lasting=persist)], drop=True))
    assert difference(ours, comparison.run()) > VISIBLE


def test_every_later_call_of_both_branches_is_masked(repository: Repository) -> None:
    """Were one branch left unpruned, the reference's own count would tell what is missing."""
    comparison = compare(repository, Setup(), 12)
    with MaskedReference(comparison.source, [Prune(9, [TOKENS])]) as reference:
        comparison.run()
    per_call = 3
    calls_a_chunk = 2 * (STEPS + 1) * per_call
    assert [counts for counts in reference.masked[:-calls_a_chunk] if counts != [0]] == []
    assert reference.masked[-calls_a_chunk:] == [[9 * len(TOKENS)]] * calls_a_chunk


def test_samples_are_judged_apart(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository, Setup(window=9, batch=2), 15)
    ours, _ = comparison.patched(ForcedPolicy({3: [(), TOKENS]}))
    comparison.exact("guidance, batch of 2", record_property, ours, comparison.reference([Prune(9, [(), TOKENS])]))
    assert difference(ours[0], comparison.run()[0]) <= 2e-6


def test_phases(repository: Repository) -> None:
    """The solver's commit is told by timestep 0 alone: for the first chunk only the device knows, later the count."""
    comparison = compare(repository, Setup(), 12)
    _, handle = comparison.patched(ForcedPolicy({}))
    first = {"first": 1, "refine": STEPS}
    assert trace(handle) == [first, *[{"first": 1, "refine": STEPS - 1, "commit": 1}] * 3]


def test_given_prefix(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository, Setup(window=9), 12, prefix=noise_of(1, 6, seed=5))
    ours, handle = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    reference = comparison.reference([Prune(12, [TOKENS])])
    comparison.exact("guidance, initial_latent of two chunks", record_property, ours, reference)
    assert [record.given for record in handle.report] == [True, True, False, False, False, False]
    assert trace(handle)[:2] == [{"first": 1}] * 2


def test_observing_changes_nothing(repository: Repository) -> None:
    comparison = compare(repository, Setup(window=9, sink=3), 15)
    expected, state = comparison.run(), torch.get_rng_state()
    with tokentrim.patch(comparison.model, ObservePolicy()) as handle:
        observed = comparison.run()
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(observed, expected)
    assert len(handle.report) == 5


def test_second_video_starts_afresh(repository: Repository) -> None:
    comparison = compare(repository, Setup(window=9), 15)
    policy = ForcedPolicy({3: [TOKENS]})
    with tokentrim.patch(comparison.model, policy) as handle:
        first, second = comparison.run(), comparison.run()
        policy.replan({})
        third = comparison.run()
    assert torch.equal(first, second)
    assert torch.equal(third, comparison.run())
    assert difference(first, third) > VISIBLE
    assert [record.chunk for record in handle.report] == [*range(5)] * 3


def test_candidate_probe_says_that_it_cannot(repository: Repository) -> None:
    comparison = compare(repository, Setup(), 9)
    with pytest.raises(UnsupportedProbeError, match="first-step"):
        comparison.patched(ForcedPolicy({1: [TOKENS]}), probe="candidate")
    assert torch.equal(comparison.run(), compare(repository, Setup(), 9).run())
