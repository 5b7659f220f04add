"""The real Reward-Forcing, in YepicAI's copy of its Python files: a sink that absorbs rows, but no dead ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import fork_checks
import pytest
import torch
from comparison import OTHERS, TOKENS, TOLERANCE, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import MaskedReference, Prune, fingerprints
from tiny_forks import rewarded_pipeline
from tiny_self_forcing import Repository, Setup, self_forcing, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim

pytestmark = [pytest.mark.upstream, pytest.mark.checks("reward-forcing", "exact")]
Record = Callable[[str, Any], None]
USUAL = Setup(window=9, sink=3)
"""As in upstream's configuration."""


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with self_forcing("Reward-Forcing") as opened:
        yield opened


def compare(repository: Repository, setup: Setup, chunks: int) -> Comparison:
    pipeline = rewarded_pipeline(repository, setup)

    def generate() -> Tensor:
        return pipeline.inference(noise_of(1, chunks * setup.block), ["a cat"], return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), setup.spared())


@contextmanager
def without_dead_rows(reference: MaskedReference, repository: Repository, late: bool) -> Iterator[list[int]]:
    """Let the reference's sink absorb no dead row; ``late``: what a prune's own chunk absorbs is not dead yet.

    Dead rows are found by their bits, as all of the reference's. Yields the number of rows held back, call by call.
    """
    layer = repository.attention.CausalWanSelfAttention
    blend, held = layer.incremental_update, list[int]()

    def absorb(self: Any, new_k: Tensor, new_v: Tensor, sink_k: Tensor, sink_v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = blend(self, new_k, new_v, sink_k, sink_v)
        fatal = [marks[0] for prune, marks in reference._active if not late or prune.start < reference._frame]
        dead = torch.isin(fingerprints(new_v), torch.cat(fatal)) if fatal else torch.zeros(new_v.shape[:2]).bool()
        held.append(int(dead.sum()))
        return torch.where(dead[..., None, None], sink_k, k), torch.where(dead[..., None, None], sink_v, v)

    with mock.patch.object(layer, "incremental_update", absorb):
        yield held


def reference_of(
    repository: Repository, comparison: Comparison, prunes: list[Prune], late: bool = True
) -> tuple[Tensor, list[int]]:
    reference = MaskedReference(comparison.source, prunes, comparison.spared)
    with reference, without_dead_rows(reference, repository, late) as held:
        return comparison.run(), held


CASES = {
    "before the window is full": {2: [TOKENS]},
    "when the sink first absorbs": {3: [TOKENS]},
    "when the sink has absorbed": {5: [TOKENS]},
    "two successive chunks": {4: [TOKENS], 5: [OTHERS]},
}


@pytest.mark.parametrize("name", CASES)
def test_prune_equals_masked_attention(repository: Repository, name: str, record_property: Record) -> None:
    plan = CASES[name]
    comparison = compare(repository, USUAL, 7)
    ours, handle = comparison.patched(ForcedPolicy(plan))
    prunes = [Prune(3 * chunk, tokens) for chunk, tokens in plan.items()]
    reference, held = reference_of(repository, comparison, prunes)
    comparison.exact(f"Reward-Forcing, {name}", record_property, ours, reference)
    assert sum(held) > 0
    assert pruned_at(handle) == sorted(plan)
    assert trace(handle) == [USUAL.trace()] * 7


def test_what_was_absorbed_before_stays(repository: Repository) -> None:
    """The first call of the pruned chunk has blended 0.001 of the tokens into the sink: the stated residual."""
    comparison = compare(repository, USUAL, 7)
    ours, _ = comparison.patched(ForcedPolicy({5: [TOKENS]}))
    never, _ = reference_of(repository, comparison, [Prune(15, [TOKENS])], late=False)
    residual = difference(ours, never)
    print(f"residual of the blend: {residual:.1e}")
    assert TOLERANCE < residual < VISIBLE
    whole = comparison.reference([Prune(15, [TOKENS])])
    assert TOLERANCE < difference(ours, whole) < VISIBLE


def test_marks_would_kill_the_sink_without_the_guard(repository: Repository) -> None:
    """The guard is needed: with upstream's own blend the sink's rows die with what they absorb."""
    comparison = compare(repository, USUAL, 7)
    guarded, _ = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    with tokentrim.patch(comparison.model, ForcedPolicy({4: [TOKENS]})):
        for block in comparison.model.generator.model.blocks:
            del block.self_attn.incremental_update
        killed = comparison.run()
        sink = comparison.model.kv_cache1[0]["v"][:, : 3 * 80, 0, 0]
        assert int((~sink.isfinite()).sum()) == 3 * len(TOKENS)
    assert difference(killed, guarded) > VISIBLE


def test_sink_smaller_than_a_chunk_takes_copies(repository: Repository, record_property: Record) -> None:
    """Upstream overwrites such a sink with rows of the window: their marks come along."""
    setup = Setup(window=9, sink=1)
    comparison = compare(repository, setup, 6)
    ours, _ = comparison.patched(ForcedPolicy({4: [TOKENS]}, prune_anchors=True))
    reference = comparison.reference([Prune(12, [TOKENS])], spared=())
    comparison.exact("Reward-Forcing, sink 1, prune_anchors", record_property, ours, reference)


def test_what_every_fork_must_show(repository: Repository) -> None:
    comparison = compare(repository, USUAL, 5)
    fork_checks.detected(comparison, "reward-forcing")
    fork_checks.neutral(comparison, chunks=5)
    fork_checks.replayed(compare(repository, USUAL, 3), chunk=2, block=3)
    fork_checks.restored(comparison, chunk=3)
    fork_checks.started_afresh(comparison, chunk=3, chunks=5)
    blend = repository.attention.CausalWanSelfAttention.incremental_update
    assert list(inspect.signature(blend).parameters)[1:5] == ["new_k", "new_v", "current_sink_k", "current_sink_v"]
