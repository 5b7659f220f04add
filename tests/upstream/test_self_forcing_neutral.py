"""Self-Forcing, observed or unpatched, is bit for bit what it was; a missed attention path is noticed."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comparison import TOKENS, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_self_forcing import (
    FOUR_STEPS,
    Repository,
    Setup,
    few_step_pipeline,
    new_cache,
    new_text_cache,
    self_forcing,
    source_of,
)
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy, TokenTrimWarning

pytestmark = pytest.mark.upstream


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with self_forcing() as opened:
        yield opened


def through_pipeline(repository: Repository, setup: Setup) -> Comparison:
    pipeline = few_step_pipeline(repository, setup)

    def generate() -> Tensor:
        return pipeline.inference(noise_of(setup.batch, 18), ["a cat"], return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), setup.spared())


def through_script(repository: Repository, setup: Setup) -> Comparison:
    """A loop as scripts write it themselves: new caches a video, no commit after the last chunk."""
    pipeline = few_step_pipeline(repository, setup)

    def generate() -> Tensor:
        pipeline.kv_cache1, pipeline.crossattn_cache = new_cache(setup), new_text_cache(setup)
        noise, condition = noise_of(1, 18), pipeline.text_encoder(text_prompts=["a cat"])
        chunks = [script_chunk(pipeline, noise[:, f : f + 3], condition, f, f + 3 < 18) for f in range(0, 18, 3)]
        return torch.cat(chunks, dim=1)

    return Comparison(generate, pipeline.generator, source_of(repository, pipeline), setup.spared())


def script_chunk(pipeline: Any, noisy: Tensor, condition: Any, start: int, commit: bool) -> Tensor:
    """Denoise one chunk by calling the generator, re-noising its prediction; then write clean context."""

    def call(latents: Tensor, timestep: Tensor) -> Tensor:
        _, x0 = pipeline.generator(
            latents, condition, timestep, kv_cache=pipeline.kv_cache1, crossattn_cache=pipeline.crossattn_cache,
            current_start=start * pipeline.frame_seq_length,
        )  # fmt: skip
        return x0

    ones, steps = torch.ones(1, 3), pipeline.denoising_step_list
    x0 = call(noisy, ones * steps[0])
    for step in steps[1:]:
        flat = x0.flatten(0, 1)
        noisy = pipeline.scheduler.add_noise(flat, torch.randn_like(flat), ones.flatten() * step)
        x0 = call(noisy.unflatten(0, x0.shape[:2]), ones * step)
    if commit:
        call(x0, ones * 0)
    return x0


LOOPS = {"pipeline": through_pipeline, "script": through_script}
SETUPS = {"global, 4 steps": Setup(steps=FOUR_STEPS), "local 9 sink 3": Setup(window=9, sink=3)}


def attributes(root: Any, namespace: Any) -> dict[str, Any]:
    """What could betray a patch: attributes, hooks and the module's globals, by identity."""
    modules = {name: module for name, module in root.named_modules()}
    places: dict[str, Any] = {f"global {k}": id(v) for k, v in vars(namespace).items()}
    for name, module in modules.items():
        for key, value in vars(module).items():
            places[f"{name}.{key}"] = tuple(map(id, value.values())) if key.endswith("_hooks") else type(value)
            places[f"{name}.{key} keys"] = sorted(map(str, value)) if isinstance(value, dict) else None
        places[f"{name}.forward"] = module.forward.__func__
    return places


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_observing_is_bit_identical(repository: Repository, loop: Any, setup: Setup) -> None:
    comparison = loop(repository, setup)
    expected, state = comparison.run(), torch.get_rng_state()
    with tokentrim.patch(comparison.model, ObservePolicy()) as handle:
        observed = comparison.run()
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(observed, expected)
    assert len(handle.report) == 6
    assert all(record.severity is not None for record in list(handle.report)[1:])


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_pruning_leaves_the_random_stream_alone(repository: Repository, loop: Any) -> None:
    comparison = loop(repository, Setup(window=9))
    comparison.run()
    state = torch.get_rng_state()
    for probe in ("first-step", "candidate"):
        comparison.patched(ForcedPolicy({2: [TOKENS]}), probe=probe)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_unpatching_restores_everything(repository: Repository, loop: Any) -> None:
    comparison = loop(repository, Setup(window=9, sink=3))
    expected, native = comparison.run(), repository.attention.attention
    before = attributes(comparison.model, repository.attention)
    handle = tokentrim.patch(comparison.model, ForcedPolicy({4: [TOKENS]}))
    assert repository.attention.attention is not native
    assert attributes(comparison.model, repository.attention) != before
    assert difference(comparison.run(), expected) > 1e-3
    handle.unpatch()
    assert repository.attention.attention is native
    assert attributes(comparison.model, repository.attention) == before
    assert torch.equal(comparison.run(), expected)


@contextmanager
def interrupted(generator: Any, calls: int) -> Iterator[None]:
    """Let a user press Ctrl-C at the generator call behind the first ``calls``."""
    left = [None] * calls

    def press(*_: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()

    handle = generator.register_forward_pre_hook(press)
    yield
    handle.remove()


def test_unpatching_in_mid_video_lets_it_go_on(repository: Repository) -> None:
    """A script that stops half way, unpatches, and generates again gets what it always got."""
    comparison = through_pipeline(repository, Setup(window=9))
    expected = comparison.run()
    handle = tokentrim.patch(comparison.model, ForcedPolicy({2: [TOKENS]}))
    with interrupted(comparison.model.generator, calls=8), pytest.raises(KeyboardInterrupt):
        comparison.run()
    assert not all(bool(layer["v"].isfinite().all()) for layer in comparison.model.kv_cache1)
    handle.unpatch()
    assert all(bool(layer["v"].isfinite().all()) for layer in comparison.model.kv_cache1)
    assert torch.equal(comparison.run(), expected)


def test_script_loop_is_pruned_exactly(repository: Repository, record_property: Any) -> None:
    setup = Setup(window=9, sink=3)
    comparison = through_script(repository, setup)
    ours, handle = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    comparison.exact("script-style loop", record_property, ours, comparison.reference([Prune(12, [TOKENS])]))
    assert pruned_at(handle) == [4]
    assert trace(handle) == [setup.trace()] * 5 + [{"first": 1, "refine": 1}]


def test_script_that_makes_new_caches_starts_a_new_video(repository: Repository) -> None:
    comparison = through_script(repository, Setup(window=9))
    with tokentrim.patch(comparison.model, ForcedPolicy({4: [TOKENS]})) as handle:
        assert torch.equal(comparison.run(), comparison.run())
    assert [(record.video, record.chunk) for record in handle.report] == [(v, c) for v in (0, 1) for c in range(6)]


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_missed_attention_path_is_noticed(repository: Repository, probe: str) -> None:
    """One layer calls attention by a name of its own: tombstones reach its output, pruning goes off with a warning."""
    comparison = through_pipeline(repository, Setup(window=9))
    layer = comparison.model.generator.model.blocks[1].self_attn
    code = type(layer).forward.__code__
    layer.forward = types.MethodType(types.FunctionType(code, copy.copy(vars(repository.attention))), layer)
    layer.forward.__func__.__defaults__ = type(layer).forward.__defaults__
    expected = comparison.run()
    with pytest.warns(TokenTrimWarning):
        ours, handle = comparison.patched(ForcedPolicy({2: [TOKENS], 4: [TOKENS]}), probe=probe)
    assert torch.equal(ours, expected)
    assert pruned_at(handle) == []
    assert "self-check failed" in " ".join(handle.report.records[2].notes)
