"""What every fork of Self-Forcing must show, whatever its cache does; called by the tests of the forks."""

from __future__ import annotations

import torch
from comparison import TOKENS, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from masked_reference import Prune

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy


def neutral(comparison: Comparison, chunks: int) -> None:
    """Observing changes neither the video nor the random stream, and every chunk but the first is judged."""
    expected, state = comparison.run(), torch.get_rng_state()
    with tokentrim.patch(comparison.model, ObservePolicy()) as handle:
        assert torch.equal(comparison.run(), expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert [record.severity is not None for record in handle.report] == [False] + [True] * (chunks - 1)


def replayed(comparison: Comparison, chunk: int, block: int) -> None:
    """Pruning and calling again is bit for bit what pruning before the chunk is."""
    ours, handle = comparison.patched(ForcedPolicy({chunk: [TOKENS]}))
    assert torch.equal(ours, comparison.reference([Prune(chunk * block, [TOKENS])], drop=True))
    assert difference(ours, comparison.run()) > VISIBLE
    assert pruned_at(handle) == [chunk]


def restored(comparison: Comparison, chunk: int) -> None:
    """After unpatching the attention function is native, no cache holds a mark, and videos are as before."""
    namespace = comparison.source.namespace
    expected, native = comparison.run(), namespace.attention
    layers = [block.self_attn for block in comparison.source.generator.model.blocks]
    before = [sorted(vars(layer)) for layer in layers]
    handle = tokentrim.patch(comparison.model, ForcedPolicy({chunk: [TOKENS]}))
    assert namespace.attention is not native
    assert difference(comparison.run(), expected) > VISIBLE
    handle.unpatch()
    assert namespace.attention is native
    assert [sorted(vars(layer)) for layer in layers] == before
    assert all(bool(layer["v"].isfinite().all()) for layer in comparison.model.kv_cache1)
    assert torch.equal(comparison.run(), expected)


def started_afresh(comparison: Comparison, chunk: int, chunks: int) -> None:
    """A second video knows nothing of the first one's marks and statistics."""
    expected = comparison.run()
    policy = ForcedPolicy({chunk: [TOKENS]})
    with tokentrim.patch(comparison.model, policy) as handle:
        assert difference(comparison.run(), expected) > VISIBLE
        policy.replan({})
        assert torch.equal(comparison.run(), expected)
    assert [(record.video, record.chunk) for record in handle.report] == [(v, c) for v in (0, 1) for c in range(chunks)]


def detected(comparison: Comparison, name: str) -> None:
    """One adapter, and only that one, claims the pipeline and its generator."""
    for model in (comparison.model, comparison.model.generator):
        assert [found.adapter for found in tokentrim.detect(model) if found.matches] == [name]


__all__ = ["detected", "neutral", "replayed", "restored", "started_afresh", "trace"]
