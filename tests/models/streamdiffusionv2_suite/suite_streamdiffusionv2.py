"""The StreamDiffusionV2 adapter on the package's own pipeline. Run by :mod:`test_foreign`, in its own process."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import tiny_stream
import torch
from counting import what_observing_adds
from tokentrim_hooks_adapters.streamdiffusion_v2 import StreamDiffusionV2
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing.conformance import AdapterConformance
from tokentrim_hooks.testing.policies import ForcedPolicy

DEAD = (0, 5, 11, 20)
KERNEL = "attention_with_kvcache_fallback"


class Reference:
    """Unpatched run with -inf at dead keys. A row belongs to the chunk in whose call its V was seen to change.

    ``drop=True`` takes the keys out instead and calls the package's own kernel, to compare bit for bit. ``weights``,
    by token, are used in the place of 0, with ``once`` in the first call only.
    """

    def __init__(
        self, first_call: int, sinks: int, drop: bool = False, weights: Any = None, once: bool = False
    ) -> None:
        self.weights, self.once = torch.zeros(tiny_stream.TOKENS), once
        for token, weight in (weights or {}).items():
            self.weights[token] = weight
        self.first_call, self.sinks, self.drop = first_call, sinks * tiny_stream.TOKENS, drop
        self.native = getattr(tiny_stream.causal_model, KERNEL)
        self.kernels = 0
        self.rows: dict[int, Tensor] = {}
        self.dead: dict[int, Tensor] = {}
        self.masked: list[int] = []

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor) -> Tensor:
        call, layer = divmod(self.kernels, 2)
        self.kernels += 1
        length = v_cache.shape[1]
        dead = self._dead(call, layer, v_cache[0].flatten(1))
        self.masked.append(int(dead.sum()))
        if self.drop:
            live = ~dead
            lengths = torch.full_like(cache_seqlens, int(live.sum()))
            return self.native(q, k_cache[:, live], v_cache[:, live], lengths)
        assert cache_seqlens.tolist() == [length]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k_cache) * q.shape[-1] ** -0.5
        weights = torch.where(dead, self.weights.repeat(length // tiny_stream.TOKENS), 1.0)
        scores = scores + weights.log() * (call == self.first_call or not self.once)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_cache)

    def _dead(self, call: int, layer: int, now: Tensor) -> Tensor:
        known = torch.full_like(now, float("nan"))
        if layer in self.rows:
            known[: len(self.rows[layer])] = self.rows[layer]
        written = (now != known).any(1)
        dead = torch.zeros(len(now), dtype=torch.bool)
        old = self.dead.get(layer, dead[:0])
        dead[: len(old)] = old
        if call == self.first_call:
            places = torch.arange(len(now))
            dead |= torch.isin(places % tiny_stream.TOKENS, torch.tensor(DEAD)) & (places >= self.sinks)
        dead &= ~written
        self.rows[layer], self.dead[layer] = now.clone(), dead
        return dead

    def run(self, pipe: Any, **options: Any) -> Tensor:
        with mock.patch.object(tiny_stream.causal_model, KERNEL, self.attend):
            return tiny_stream.run(pipe, 9, 12, **options)


# Name, options, steps per chunk, chunk to prune. The window of 6 frames is full from chunk 4 (the first has 2) on.
CONFIGURATIONS = [
    ("filling", {}, 2, 3),
    ("the chunk that fills it", {}, 2, 4),
    ("ring", {}, 2, 7),
    ("ring, one step", {"steps": (700, 0)}, 1, 8),
    ("ring, three steps", {"steps": (700, 500, 300, 0)}, 3, 6),
    ("ring, no sinks", {"sinks": 0, "window": 5}, 2, 6),
]


@pytest.mark.parametrize("drop", [False, True], ids=["masked", "dropped"])
@pytest.mark.parametrize(("name", "options", "steps", "chunk"), CONFIGURATIONS)
def test_equals_the_reference(
    name: str, options: dict[str, Any], steps: int, chunk: int, drop: bool, record_property: Any
) -> None:
    """-inf at dead keys to 1e-5, through ring overwrites and a rewind of positions; dropped keys bit for bit."""
    pipe = tiny_stream.pipeline(**options)
    plain = tiny_stream.run(pipe, 9, 12, rewind_at=10)
    state = torch.get_rng_state()
    reference = Reference(chunk * steps, options.get("sinks", tiny_stream.SINKS), drop)
    expected = reference.run(pipe, rewind_at=10)
    with tokentrim.patch(pipe, ForcedPolicy({chunk: DEAD})) as handle:
        actual = tiny_stream.run(pipe, 9, 12, rewind_at=10)
    error, effect = float((actual - expected).abs().max()), float((expected - plain).abs().max())
    record_property("figure", f"streamdiffusionv2 {name}{' (drop)' * drop}: effect {effect:.2e} error {error:.1e}")
    assert max(reference.masked) > 0 and reference.masked[-1] < max(reference.masked)  # overwritten rows live again
    assert effect > 1e-2 and error <= (0 if drop else 1e-5)
    assert torch.equal(state, torch.get_rng_state())
    phases = {"first": 1} | ({"refine": steps - 1} if steps > 1 else {})
    assert [record.phases for record in handle.report] == [phases] * 12
    assert [record.start for record in handle.report] == [0, *range(2, 13)]
    assert [record.dead for record in handle.report] == [
        reference.masked[2 * chunk * steps] if n == chunk else 0 for n in range(12)
    ]
    assert torch.equal(plain, tiny_stream.run(pipe, 9, 12, rewind_at=10))


class TestRing(AdapterConformance):
    """The conformance kit on a stream whose ring turns.

    Up to chunk 7: later the ring drops newer frames before the one that is stuck, which the kit's policies, who count
    from the newest on, cannot tell.
    """

    adapter = StreamDiffusionV2
    chunks, chunk_to_prune, tokens, anchor_frames = 8, 6, DEAD, tiny_stream.SINKS

    def make_model(self) -> Any:
        return tiny_stream.pipeline()

    def run(self, model: Any, seed: int) -> Tensor:
        return tiny_stream.run(model, seed, self.chunks)

    def reference(self, model: Any, seed: int) -> Tensor:
        with mock.patch.object(tiny_stream.causal_model, KERNEL, Reference(12, tiny_stream.SINKS).attend):
            return self.run(model, seed)

    def weighed_reference(self, model: Any, seed: int, weights: Any, calls: Any) -> Tensor:
        reference = Reference(12, tiny_stream.SINKS, weights=weights, once=calls is not None)
        with mock.patch.object(tiny_stream.causal_model, KERNEL, reference.attend):
            return self.run(model, seed)


@dataclass(frozen=True)
class HidesOldest(tokentrim.Policy):
    """Hides the two oldest frames behind the sinks, from one chunk on."""

    chunk: int = 0

    def hide(self, chunk: Any, context: Any) -> Any:
        age = (~torch.tensor(context.anchors)).cumsum(0)
        return (age == 1) | (age == 2) if chunk.index >= self.chunk else None


class OldestDead(Reference):
    """-inf at the two frames behind the sinks whose rows changed longest ago, those of the call's chunk aside."""

    steps = 2

    def _dead(self, call: int, layer: int, now: Tensor) -> Tensor:
        known = torch.full_like(now, float("nan"))
        old = self.rows.get(layer, now[:0])
        known[: len(old)] = old
        when = torch.zeros(len(now), dtype=torch.long)
        before = self.dead.get(layer, when[:0])
        when[: len(before)] = before
        self.dead[layer] = torch.where((now != known).any(1), call, when)
        self.rows[layer] = now.clone()
        frames = self.dead[layer].view(-1, tiny_stream.TOKENS)[:, 0]
        free = [n for n in range(2, len(frames)) if frames[n] // self.steps < call // self.steps]
        oldest = sorted(free, key=lambda n: int(frames[n]))[:2] if call >= self.first_call else []
        return torch.tensor([n in oldest for n in range(len(frames))]).repeat_interleave(tiny_stream.TOKENS)


@pytest.mark.parametrize("steps", [(700, 0), (700, 400, 0), (700, 500, 300, 0)], ids=len)
@pytest.mark.parametrize("chunk", [3, 4, 6])
def test_frames_of_the_ring_are_told_by_age(steps: tuple[int, ...], chunk: int) -> None:
    """Also in calls behind a chunk's first, which write the next slot, and where rows of the beginning are stuck."""
    pipe, count = tiny_stream.pipeline(steps=steps), len(steps) - 1
    plain, reference = tiny_stream.run(pipe, 9, 11), OldestDead(chunk * count, tiny_stream.SINKS)
    reference.steps = count
    with mock.patch.object(tiny_stream.causal_model, KERNEL, reference.attend):
        expected = tiny_stream.run(pipe, 9, 11)
    with tokentrim.patch(pipe, HidesOldest(chunk=chunk)):
        actual = tiny_stream.run(pipe, 9, 11)
    assert (expected - plain).abs().max() > 1e-2
    assert (actual - expected).abs().max() <= 1e-5


def test_batched_streams_are_refused() -> None:
    """Each sample of a batched call is another chunk at another step."""
    pipe = tiny_stream.pipeline()
    tiny_stream.run(pipe, 0, 2)
    with tokentrim.patch(pipe):
        for method in (pipe.inference_stream, pipe.inference):
            with pytest.raises(tokentrim.UnsupportedContextError, match="batched streams"):
                method(torch.randn(1, 1, 16, 8, 12), 0, 0, None)
        with pytest.raises(tokentrim.UnsupportedContextError, match="batched streams"):
            pipe.prepare(["a"], "cpu", torch.float32, noise=torch.randn(2, 2, 16, 8, 12), current_end=48)
    assert "inference_stream" not in vars(pipe)


def test_a_batched_stream_goes_on_unpatched_where_that_is_wished() -> None:
    """As ``tokentrim run`` wishes: a script that streams in batches must not end because of us."""
    pipe = tiny_stream.pipeline()
    pipe.inference = lambda *_: "streamed"
    with tokentrim.patch(pipe, on_error="warn") as handle:
        with pytest.warns(tokentrim.TokenTrimWarning, match="batched streams"):
            assert pipe.inference(torch.randn(1, 1, 16, 8, 12), 0, 0, None) == "streamed"
        assert not handle.active and pipe.inference() == "streamed"


def test_adaptive_sinks_are_refused_at_the_first_call() -> None:
    """They overwrite other rows in every layer; the message says what to set."""
    pipe = tiny_stream.pipeline(adaptive=0.2)
    with tokentrim.patch(pipe), pytest.raises(tokentrim.UnsupportedContextError, match="adapt_sink_threshold"):
        tiny_stream.run(pipe, 0, 3)
    assert torch.isfinite(tiny_stream.run(pipe, 0, 5)).all()


def test_the_manager_around_the_pipeline_is_recognised() -> None:
    """``SingleGPUInferencePipeline`` holds the pipeline; a bare generator cannot tell where chunks begin."""
    pipe = tiny_stream.pipeline()
    manager = SimpleNamespace(pipeline=pipe)
    assert [found.adapter for found in tokentrim.detect(manager) if found.matches] == ["streamdiffusion-v2"]
    assert not any(found.matches for found in tokentrim.detect(pipe.generator))


OPS = 32
"""Operations that observing adds to a chunk, at most; see tests/adapters/test_ops.py."""


def test_what_observing_adds(record_property: Any) -> None:
    """In numbers that do not depend on the machine: they may fall, they may not grow unseen."""
    ops, syncs, log = what_observing_adds(
        tiny_stream.pipeline, lambda pipe: tiny_stream.run(pipe, 0, 8), record_property, "streamdiffusionv2"
    )
    assert OPS - 1 < ops <= OPS and syncs <= 1, (ops, syncs, str(log))
