"""The real MemRoPE: refused with its EMA memory, whatever its caller's caches hold; exact where it only evicts.

Its pipeline's caches have entries that LongLive's have not, and are refused before anything is marked. A caller may
make plain caches, for the model does without the others: then the memory itself must be noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fork_checks
import pytest
import torch
from comparison import OTHERS, TOKENS, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_memrope import SHIPPED, memrope, memrope_pipeline
from tiny_self_forcing import Repository, source_of
from tokentrim_hooks_adapters.longlive import LongLive
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import TokenTrimWarning, UnsupportedContextError

pytestmark = pytest.mark.upstream

CHUNKS, EVICTS = 7, 4
"""Chunks a video; the first that evicts, and so the one whose first call makes the memory."""
ENTRIES = r"(?s)original_spatial_indices, q, selected_token_indices, token_.*nothing is pruned"
MEMORY = r"160 of 960 keys in self attention are no rows of the KV cache"
"""The two memory frames of 80 tokens, among the window's twelve."""


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with memrope() as opened:
        yield opened


def compare(repository: Repository, method: str, **options: Any) -> Comparison:
    pipeline = memrope_pipeline(repository, method, **options)
    noise = noise_of(1, 3 * CHUNKS)

    def generate() -> Tensor:
        return pipeline.inference(noise, ["a cat"], return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), SHIPPED.spared())


def unmarked(comparison: Comparison) -> bool:
    return all(bool(layer[name].isfinite().all()) for layer in comparison.model.kv_cache1 for name in "kv")


def refused(comparison: Comparison, words: str, chunk: int, **options: Any) -> Tensor:
    """Raised in these words; with a warning instead, the video goes on and comes back. The next one is as ever."""
    expected = comparison.run()
    with pytest.raises(UnsupportedContextError, match=words):
        comparison.patched(ForcedPolicy({chunk: [TOKENS]}), **options)
    with pytest.warns(TokenTrimWarning, match=words):
        video, handle = comparison.patched(ForcedPolicy({chunk: [TOKENS]}), on_error="warn", **options)
    assert not handle.active and unmarked(comparison)
    assert torch.equal(comparison.run(), expected)
    return video


@pytest.mark.parametrize("method", ["ema", "eviction"])
@pytest.mark.parametrize("chunk", [2, EVICTS, 5])
def test_its_caches_are_refused_before_anything_is_marked(repository: Repository, method: str, chunk: int) -> None:
    comparison = compare(repository, method)
    assert torch.equal(refused(comparison, ENTRIES, chunk), comparison.run())


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("chunk", [EVICTS, 5])
def test_plain_caches_are_refused_once_there_is_a_memory(repository: Repository, chunk: int, adaptive: bool) -> None:
    """The evicting call adds ``ema_initialized``: seen at the prune behind that very call."""
    comparison = compare(repository, "ema", bare=True, adaptive=adaptive)
    assert torch.equal(refused(comparison, "differs in: ema_initialized", chunk), comparison.run())


def test_memory_made_of_pruned_rows_is_refused(repository: Repository) -> None:
    """Exact until the memory is made. That call writes it late, when we are aside: no mark may come back with it."""
    comparison = compare(repository, "ema", bare=True)
    video = refused(comparison, MEMORY, 2)
    exact = comparison.reference([Prune(6, [TOKENS])])[:, : 3 * EVICTS]
    assert difference(video[:, : 3 * EVICTS], exact) <= 1e-5
    assert difference(video, comparison.run()) < 0.1, "the rest is near: an element of V per memory row was lost"


class Trusting(LongLive):
    """What a hasty author would write: it takes any entries."""

    def require_entries(self, cache: Any) -> None:
        """Anything goes."""


@pytest.mark.parametrize("chunk", [2, EVICTS, 5])
def test_an_adapter_that_takes_any_entries_is_not_silently_wrong(repository: Repository, chunk: int) -> None:
    """The account of keys is enough, whatever the entries: at the next call that makes memory of marked rows."""
    assert torch.isfinite(refused(compare(repository, "ema"), MEMORY, chunk, adapter=Trusting)).all()


CASES = {
    "before eviction": {2: [TOKENS]},
    "first evicting chunk": {EVICTS: [TOKENS]},
    "two prunes": {3: [TOKENS], 5: [OTHERS]},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bare", [True, False], ids=["plain caches", "its caches"])
def test_eviction_equals_masked_attention(repository: Repository, name: str, bare: bool, record_property: Any) -> None:
    """Plain caches by LongLive's adapter; MemRoPE's own hold nothing more that attention would see."""
    comparison, plan = compare(repository, "eviction", bare=bare), CASES[name]
    ours, handle = comparison.patched(ForcedPolicy(plan), **({} if bare else {"adapter": Trusting}))
    reference = comparison.reference([Prune(3 * chunk, tokens) for chunk, tokens in plan.items()])
    comparison.exact(f"MemRoPE, eviction, {name}, bare={bare}", record_property, ours, reference)
    assert pruned_at(handle) == sorted(plan)
    assert trace(handle) == [SHIPPED.trace()] * CHUNKS


def test_what_every_fork_must_show(repository: Repository) -> None:
    comparison = compare(repository, "eviction", bare=True)
    fork_checks.detected(comparison, "longlive")
    fork_checks.neutral(comparison, chunks=CHUNKS)
    fork_checks.replayed(comparison, chunk=5, block=3)
    fork_checks.restored(comparison, chunk=5)
    fork_checks.started_afresh(comparison, chunk=5, chunks=CHUNKS)


def test_the_memory_does_something(repository: Repository) -> None:
    """The refusals above are of a model that uses its memory."""
    ema, eviction = (compare(repository, method).run() for method in ("ema", "eviction"))
    assert torch.equal(ema[:, : 3 * EVICTS], eviction[:, : 3 * EVICTS])
    assert difference(ema, eviction) > VISIBLE
    found = [item.adapter for item in tokentrim.detect(compare(repository, "ema").model) if item.matches]
    assert found == ["longlive"], "recognised by its generator, refused by its caches"
