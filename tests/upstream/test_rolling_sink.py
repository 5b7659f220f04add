"""The real Rolling Sink: what is pruned stays so when the first frames come back into the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fork_checks
import pytest
import torch
from comparison import OTHERS, TOKENS, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_forks import rolling_sink_pipeline
from tiny_self_forcing import Repository, Setup, few_step_pipeline, self_forcing, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import CommitWindow, UnsupportedPolicyError

pytestmark = [pytest.mark.upstream, pytest.mark.checks("rolling-sink", "exact")]
Record = Callable[[str, Any], None]
WINDOW, CHUNKS = Setup(window=9), 8
"""Frames come back from the fourth chunk on: 5 to 3, 2 to 0, then 0 to 2, 3 to 5, and so on."""


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with self_forcing("RollingSink") as opened:
        yield opened


def compare(repository: Repository, setup: Setup = WINDOW) -> Comparison:
    pipeline = rolling_sink_pipeline(repository, setup)
    noise = noise_of(setup.batch, 3 * CHUNKS)

    def generate() -> Tensor:
        return pipeline.inference(noise, ["a cat", "a dog"][: setup.batch], return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), setup.spared())


CASES = {
    "before the window is full": {1: [TOKENS]},
    "as it is": {2: [TOKENS]},
    "as the first frames come back": {3: [TOKENS]},
    "when they have": {5: [TOKENS]},
    "two prunes": {2: [TOKENS], 5: [OTHERS]},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_prune_equals_masked_attention(repository: Repository, name: str, probe: str, record_property: Record) -> None:
    comparison, plan = compare(repository), CASES[name]
    ours, handle = comparison.patched(ForcedPolicy(plan), probe=probe)
    if probe == "first-step":
        reference = comparison.reference([Prune(3 * chunk, tokens) for chunk, tokens in plan.items()])
        comparison.exact(f"Rolling Sink, {name}", record_property, ours, reference)
    assert torch.isfinite(ours).all()
    assert pruned_at(handle) == sorted(plan)
    assert trace(handle) == [WINDOW.trace()] * CHUNKS


def test_one_sample_of_two(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository, Setup(window=9, batch=2))
    ours, _ = comparison.patched(ForcedPolicy({3: [TOKENS, ()]}))
    comparison.exact("Rolling Sink, batch", record_property, ours, comparison.reference([Prune(9, [TOKENS, ()])]))


def test_the_first_frames_do_come_back(repository: Repository) -> None:
    """Bit for bit, and dead where they were pruned: with marks in the window alone they would be alive again."""
    comparison = compare(repository)
    with tokentrim.patch(comparison.model, ForcedPolicy({3: [TOKENS]})):
        comparison.run()
        layer = comparison.model.kv_cache1[1]
        back = [int((layer["v"][0, :, 0, 1:5] == row[0, 1:5]).all(-1).sum()) for row in layer["v_original"][0]]
        assert sum(back[: 6 * 80]) >= 3 * 80
        dead = ~layer["v"][0, :, 0, 0].isfinite()
        assert set((dead.nonzero().flatten() % 80).tolist()) == set(TOKENS)


def test_policies_that_a_commit_would_undo_are_refused(repository: Repository) -> None:
    for policy in (CommitWindow(6), tokentrim.RowMoments(), tokentrim.SoftPrune()):
        with pytest.raises(UnsupportedPolicyError):
            tokentrim.patch(compare(repository).model, policy)


def test_what_every_fork_must_show(repository: Repository) -> None:
    comparison = compare(repository)
    fork_checks.detected(comparison, "rolling-sink")
    fork_checks.neutral(comparison, chunks=CHUNKS)
    fork_checks.replayed(comparison, chunk=4, block=3)
    fork_checks.restored(comparison, chunk=3)
    assert all(bool(layer["v_original"].isfinite().all()) for layer in comparison.model.kv_cache1)
    fork_checks.started_afresh(comparison, chunk=3, chunks=CHUNKS)


def test_it_is_not_self_forcing(repository: Repository) -> None:
    comparison = compare(repository)
    ours = comparison.run()
    with self_forcing() as base:
        pipeline = few_step_pipeline(base, WINDOW)
        torch.manual_seed(0)
        plain = pipeline.inference(noise_of(1, 3 * CHUNKS), ["a cat"], return_latents=True)[1]
    assert difference(ours, plain) > VISIBLE
