"""The real MemRoPE: memory frames that are running means of what leaves the window, but of no dead row.

The reference (``memrope_reference.py``) keeps dead rows out by hand, and compares the memory with the rule written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fork_checks
import pytest
import torch
from comparison import OTHERS, TOKENS, TOLERANCE, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import MaskedReference, Prune
from memrope_reference import without_dead_rows
from tiny_memrope import SHIPPED, memrope, memrope_pipeline
from tiny_self_forcing import TOKENS as FRAME
from tiny_self_forcing import Repository, source_of
from tokentrim_hooks_adapters.longlive import LongLive
from tokentrim_hooks_adapters.memrope import MemRope
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Patches, SoftPrune, TokenTrimWarning, UnsupportedContextError, UnsupportedPolicyError

pytestmark = [pytest.mark.upstream, pytest.mark.checks("memrope", "exact")]
Record = Callable[[str, Any], None]

CHUNKS, EVICTS = 8, 4
"""Chunks a video; the first that evicts, and so the one whose first call makes the memory."""



@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with memrope() as opened:
        yield opened


def compare(repository: Repository, method: str = "ema", batch: int = 1, **options: Any) -> Comparison:
    pipeline = memrope_pipeline(repository, method, **options)
    noise = noise_of(batch, 3 * CHUNKS)

    def generate() -> Tensor:
        return pipeline.inference(noise, ["a cat", "a dog"][:batch], return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), SHIPPED.spared())


def reference_of(comparison: Comparison, plan: dict[int, Any], late: bool = True) -> Tensor:
    prunes = [Prune(3 * chunk, tokens) for chunk, tokens in plan.items()]
    with (
        MaskedReference(comparison.source, prunes, comparison.spared) as reference,
        without_dead_rows(reference, late) as off,
    ):
        latents = comparison.run()
    assert len(off) == 3 * 4 * (CHUNKS - EVICTS), "two memories in K and in V of three layers, from the first eviction"
    assert max(off) < 1e-6
    return latents


CASES = {
    "before there is a memory": {2: [TOKENS]},
    "as the memory is made": {EVICTS: [TOKENS]},
    "behind a memory": {5: [TOKENS]},
    "two prunes": {3: [TOKENS], 5: [OTHERS]},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bare", [True, False], ids=["plain caches", "its caches"])
def test_prune_equals_masked_attention(repository: Repository, name: str, bare: bool, record_property: Record) -> None:
    comparison, plan = compare(repository, bare=bare), CASES[name]
    ours, handle = comparison.patched(ForcedPolicy(plan))
    comparison.exact(f"MemRoPE, {name}, bare={bare}", record_property, ours, reference_of(comparison, plan))
    assert pruned_at(handle) == sorted(plan)
    assert trace(handle) == [SHIPPED.trace()] * CHUNKS


@pytest.mark.parametrize("name", CASES)
def test_eviction_equals_masked_attention(repository: Repository, name: str, record_property: Record) -> None:
    comparison, plan = compare(repository, "eviction"), CASES[name]
    ours, handle = comparison.patched(ForcedPolicy(plan))
    reference = comparison.reference([Prune(3 * chunk, tokens) for chunk, tokens in plan.items()])
    comparison.exact(f"MemRoPE, eviction, {name}", record_property, ours, reference)
    assert pruned_at(handle) == sorted(plan)


def test_what_was_remembered_before_stays(repository: Repository) -> None:
    """What left as the pruned chunk came was alive then: a stated residual."""
    comparison = compare(repository)
    ours, _ = comparison.patched(ForcedPolicy({5: [TOKENS]}))
    assert TOLERANCE < difference(ours, reference_of(comparison, {5: [TOKENS]}, late=False)) < VISIBLE


def test_the_memory_of_dead_rows_is_another(repository: Repository) -> None:
    """The rule is needed: with dead rows in its means the reference is visibly another video."""
    comparison = compare(repository)
    ours, _ = comparison.patched(ForcedPolicy({2: [TOKENS]}))
    assert difference(ours, comparison.reference([Prune(6, [TOKENS])])) > TOLERANCE


class Trusting(MemRope):
    """What a hasty author would write: nothing about the memory."""

    keeps_memory = False

    def attach(self, model: Any, patches: Patches) -> None:
        """Attention alone."""
        LongLive.attach(self, model, patches)


@pytest.mark.parametrize("chunk", [2, EVICTS, 5])
def test_a_hasty_adapter_is_not_silently_wrong(repository: Repository, chunk: int) -> None:
    """The account of keys is enough: at the next call that makes memory of marked rows. No mark comes back late."""
    comparison = compare(repository)
    expected, plan = comparison.run(), ForcedPolicy({chunk: [TOKENS]})
    with pytest.raises(UnsupportedContextError, match="160 of 960 keys in self attention are no rows"):
        comparison.patched(plan, adapter=Trusting)
    with pytest.warns(TokenTrimWarning, match="160 of 960 keys in self attention are no rows"):
        video, handle = comparison.patched(plan, on_error="warn", adapter=Trusting)
    assert not handle.active
    assert torch.isfinite(video).all()
    assert all(bool(layer[name].isfinite().all()) for layer in comparison.model.kv_cache1 for name in "kv")
    assert torch.equal(comparison.run(), expected)


def test_nothing_left_to_remember(repository: Repository) -> None:
    everything = [tuple(range(FRAME))]
    comparison = compare(repository)
    expected = comparison.run()
    with pytest.raises(UnsupportedContextError, match="nothing that MemRoPE's memory"):
        comparison.patched(ForcedPolicy({3: everything}))
    with pytest.warns(TokenTrimWarning, match="nothing that MemRoPE's memory"):
        video, _ = comparison.patched(ForcedPolicy({3: everything}), on_error="warn")
    assert torch.isfinite(video).all()
    assert torch.equal(comparison.run(), expected)


def test_adaptive_memory_and_weights_are_refused(repository: Repository) -> None:
    with pytest.raises(UnsupportedContextError, match="ema_adaptive=False"):
        tokentrim.patch(compare(repository, adaptive=True).model)
    with pytest.raises(UnsupportedPolicyError):
        tokentrim.patch(compare(repository).model, SoftPrune())


def test_what_every_fork_must_show(repository: Repository) -> None:
    comparison = compare(repository)
    fork_checks.detected(comparison, "memrope")
    fork_checks.neutral(comparison, chunks=CHUNKS)
    fork_checks.restored(comparison, chunk=5)
    fork_checks.started_afresh(comparison, chunk=5, chunks=CHUNKS)
    fork_checks.replayed(compare(repository, "eviction"), chunk=5, block=3)


def test_the_memory_does_something(repository: Repository) -> None:
    ema, eviction = (compare(repository, method).run() for method in ("ema", "eviction"))
    assert torch.equal(ema[:, : 3 * EVICTS], eviction[:, : 3 * EVICTS])
    assert difference(ema, eviction) > VISIBLE
