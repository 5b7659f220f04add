"""Attention processors that somebody puts into a model after its first prune: said, and never told as pruned.

What a processor of diffusers' own does, in a file of the user's: the same mathematics, and the kernel called directly.
"""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import pytest
import torch
from targets import TARGETS

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
HOME = "dispatch_attention_fn"
WITH_PROCESSORS = TARGETS[1:]
each_pipeline = pytest.mark.parametrize("target", WITH_PROCESSORS, ids=lambda target: target.name)


def direct(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
    """Attention on ``[B, tokens, heads, d]`` by the kernel, which is not tapped; a mask may be flex attention's."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None and not torch.is_tensor(attn_mask):
        return torch.nn.attention.flex_attention.flex_attention(q, k, v, block_mask=attn_mask).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2)


def elsewhere(function: Any) -> Any:
    """The same code as if it stood in a user's own file, which imports the kernel by itself."""
    code = getattr(function, "__wrapped__", function)
    there = {**code.__globals__, HOME: direct}
    copied = types.FunctionType(code.__code__, there, code.__name__, code.__defaults__, code.__closure__)
    copied.__kwdefaults__ = code.__kwdefaults__
    return copied


def put_in(denoiser: torch.nn.Module, last_only: bool = False) -> int:
    """Give every attention module, or the last one, a processor of its own; return to how many."""
    found = 0
    for module in reversed(list(denoiser.modules())):
        inner = getattr(module, "processor", None)
        if inner is None or not hasattr(sys.modules[type(inner).__module__], HOME):
            continue
        own = type("Own", (type(inner),), {"__call__": elsewhere(type(inner).__call__)})
        module.processor, found = own(), found + 1
        vars(module.processor).update(vars(inner))
    return found


def said(action: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = action()
    return result, [str(w.message) for w in seen if issubclass(w.category, tokentrim.TokenTrimWarning)]


@each_pipeline
@pytest.mark.parametrize("proved", (False, True), ids=("never proved", "proved before"))
def test_a_prune_that_is_not_seen_any_more_is_said_and_not_recorded(target: Any, proved: bool) -> None:
    never_patched, pipeline = target.make(), target.make()
    assert put_in(target.denoiser(never_patched))
    plain = target.run(never_patched)
    with tokentrim.patched(pipeline, POLICY) as handle:
        if proved:
            assert not torch.equal(target.run(pipeline), plain) and handle.report.triggers == 1
        before = len(handle.report)
        put_in(target.denoiser(pipeline))
        video, words = said(lambda: target.run(pipeline))
        records = handle.report.records[before:]
    assert torch.equal(video, plain), "with nothing pruned"
    assert len(words) == 1 and "could not be proved" in words[0], words
    assert not any(record.pruned or record.dead for record in records)
    assert any("self-check failed" in note for record in records for note in record.notes)


class PutInLate:
    """An observer that gives a denoiser other processors once a chunk has been accepted."""

    def __init__(self, into: torch.nn.Module, after: int) -> None:
        self.denoiser, self.after, self.chunks = into, after, []

    def on_chunk(self, records: Any, _latents: Any) -> None:
        self.chunks.append(records[0].chunk)
        if records[0].chunk == self.after and self.chunks.count(self.after) == 1:
            put_in(self.denoiser)


@pytest.mark.parametrize("where", ("denoiser", "block"), ids=("everywhere", "in the last block"))
@each_pipeline
def test_what_is_dead_and_seen_again_is_said(target: Any, where: str) -> None:
    """Amid a video, behind its last prune: no replay is there to find it."""
    pipeline = target.make()
    late = PutInLate(target.depths(pipeline)[where], after=1)
    with tokentrim.patched(pipeline, ForcedPolicy({1: [0, 3]}), observers=[late]) as handle:
        _, words = said(lambda: target.run(pipeline))
        records = handle.report.records
    assert max(late.chunks) > 1 and any(record.dead for record in records)
    (told,) = words
    # The marks of a cache surface; a sequence has none.
    assert "pruned tokens may have been read" in told or "pruned rows reached attention that is not tapped" in told
    assert any("attention" in note and "tapped" in note for record in records for note in record.notes)


@each_pipeline
def test_a_dispatcher_with_names_of_its_own_is_refused(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library's function in the model's module: what it takes by place cannot be told; it was a KeyError."""
    pipeline = target.make()
    inner = (getattr(module, "processor", None) for module in target.denoiser(pipeline).modules())
    homes = (sys.modules[type(processor).__module__] for processor in inner if processor is not None)
    home = next(home for home in homes if hasattr(home, HOME))

    def other(q: Any, k: Any, v: Any, attn_mask: Any = None, **rest: Any) -> Any:
        return direct(q, k, v, attn_mask, **rest)

    monkeypatch.setattr(home, HOME, other)
    with pytest.raises(tokentrim.AttachError, match=r"takes \(q, k, v, .*cannot be tapped with"):
        tokentrim.patch(pipeline)
