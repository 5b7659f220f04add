"""The real LongLive 1.0, patched: plain and infinite attention, and prompts that change in the middle of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import OTHERS, TOKENS, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_longlive import longlive, longlive_pipeline
from tiny_self_forcing import Repository, Setup, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy

pytestmark = [pytest.mark.upstream, pytest.mark.checks("longlive", "exact")]
Record = Callable[[str, Any], None]

SINK = Setup(window=9, sink=3)
CHUNKS, SWITCH = 6, 12
"""Chunks a video; the frame at which the prompt changes, in front of chunk 4."""


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "infinite"])
def repository(request: Any) -> Iterator[tuple[Repository, bool]]:
    with longlive(request.param) as opened:
        yield opened, request.param


def compare(repository: tuple[Repository, bool], setup: Setup = SINK, chunks: int = CHUNKS) -> Comparison:
    pipeline = longlive_pipeline(repository[0], setup, repository[1])
    noise, prompts = noise_of(setup.batch, 3 * chunks), ["a cat", "a dog by the sea"][: setup.batch]

    def generate() -> Tensor:
        return pipeline.inference(noise, prompts, return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository[0], pipeline), setup.spared())


def switching(repository: tuple[Repository, bool], global_sink: bool, setup: Setup = SINK) -> Comparison:
    """A video whose prompt changes at frame 12."""
    pipeline = longlive_pipeline(repository[0], setup, repository[1], interactive=True, global_sink=global_sink)
    pipeline.generator.model._prepare_blockwise_causal_attn_mask = lambda **_: None
    noise, prompts = noise_of(1, 3 * CHUNKS), [["a cat"], ["a dog by the sea"]]

    def generate() -> Tensor:
        return pipeline.inference(
            noise, text_prompts_list=prompts, switch_frame_indices=[SWITCH], return_latents=True
        )[1]

    return Comparison(generate, pipeline, source_of(repository[0], pipeline), setup.spared())


CASES = {
    "local 9 sink 3, before eviction": (SINK, [2]),
    "local 9 sink 3, two prunes after eviction": (SINK, [3, 5]),
    "local 9 sink 0": (Setup(window=9), [4]),
}


@pytest.mark.parametrize("name", CASES)
def test_prune_equals_masked_attention(repository: Any, name: str, record_property: Record) -> None:
    setup, where = CASES[name]
    comparison = compare(repository, setup)
    forced = {chunk: [tokens] for chunk, tokens in zip(where, (TOKENS, OTHERS), strict=False)}
    ours, handle = comparison.patched(ForcedPolicy(forced))
    reference = comparison.reference([Prune(3 * chunk, tokens) for chunk, tokens in forced.items()])
    comparison.exact(f"longlive {kind(repository)}, {name}", record_property, ours, reference)
    assert pruned_at(handle) == where
    assert trace(handle) == [setup.trace()] * CHUNKS


def kind(repository: tuple[Repository, bool]) -> str:
    return "infinite" if repository[1] else "plain"


def test_replay_is_bit_identical_to_pruning_before_the_chunk(repository: Any) -> None:
    comparison = compare(repository)
    ours, _ = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    assert torch.equal(ours, comparison.reference([Prune(12, [TOKENS])], drop=True))
    assert difference(ours, comparison.run()) > VISIBLE


def test_candidate_probe_and_revival(repository: Any, record_property: Record) -> None:
    comparison = compare(repository)
    for probe in ("candidate", "first-step"):
        ours, _ = comparison.patched(ForcedPolicy({4: [TOKENS]}, persist=False), probe=probe)
        reference = comparison.reference([Prune(12, [TOKENS], lasting=False)])
        name = f"longlive {kind(repository)}, persist=False, {probe}"
        comparison.exact(name, record_property, ours, reference)


@pytest.mark.parametrize("global_sink", [False, True], ids=["new sink", "global sink"])
@pytest.mark.parametrize("chunk", [3, 4])
def test_prompt_switch(repository: Any, global_sink: bool, chunk: int, record_property: Record) -> None:
    """A prune before the switch is forgotten by it: the rows are written again. A prune behind it works as ever."""
    comparison = switching(repository, global_sink)
    ours, handle = comparison.patched(ForcedPolicy({chunk: [TOKENS]}))
    # The recache call of 9 frames makes frames 3 to 5 the sink, unless the first one is global.
    sink = range(3, 6) if chunk == 4 and not global_sink else range(3)
    reference = comparison.reference([Prune(3 * chunk, [TOKENS])], spared=sink)
    name = f"longlive {kind(repository)}, switch, {'global' if global_sink else 'new'} sink, chunk {chunk}"
    comparison.exact(name, record_property, ours, reference)
    assert [{phase: record[phase] for phase in SINK.trace()} for record in trace(handle)] == [SINK.trace()] * CHUNKS
    assert pruned_at(handle) == [chunk]


def test_switch_rewrites_marks_and_resets_statistics(repository: Any) -> None:
    comparison = switching(repository, global_sink=False)
    finite: list[bool] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        finite.append(all(bool(layer["v"].isfinite().all()) for layer in kwargs["kv_cache"]))

    hook = comparison.model.generator.register_forward_pre_hook(look, with_kwargs=True)
    _, handle = comparison.patched(ForcedPolicy({3: [TOKENS]}))
    hook.remove()
    # Chunk 3: its first call is made again for the proof, and pruned; behind that the marks are there. The 14th is
    # the recache call.
    assert finite[: 9 + 2] == [True] * 11
    assert finite[12:14] == [False] * 2
    assert all(finite[14:])
    records = list(handle.report)
    assert [record.mean is None for record in records] == [True, True, False, False, True, False]


def test_sink_is_spared_unless_asked(repository: Any, record_property: Record) -> None:
    comparison = compare(repository)
    ours, handle = comparison.patched(ForcedPolicy({4: [TOKENS]}, prune_anchors=True))
    reference = comparison.reference([Prune(12, [TOKENS])], spared=())
    comparison.exact(f"longlive {kind(repository)}, prune_anchors=True", record_property, ours, reference)
    assert [record.dead for record in handle.report if record.pruned] == [6 * len(TOKENS)]
    _, handle = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    assert [record.dead for record in handle.report if record.pruned] == [3 * len(TOKENS)]


def test_observing_is_bit_identical(repository: Any) -> None:
    for comparison in (compare(repository), switching(repository, global_sink=False)):
        expected, state = comparison.run(), torch.get_rng_state()
        with tokentrim.patch(comparison.model, ObservePolicy()) as handle:
            observed = comparison.run()
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(observed, expected)
        assert all(record.severity is not None for record in list(handle.report)[1:])


def test_second_video_starts_afresh(repository: Any) -> None:
    """Upstream makes new caches for every video."""
    comparison = compare(repository)
    fresh, _ = comparison.patched(ForcedPolicy({4: [OTHERS]}))
    policy = ForcedPolicy({4: [TOKENS]})
    with tokentrim.patch(comparison.model, policy) as handle:
        first = comparison.run()
        policy.replan({4: [OTHERS]})
        second = comparison.run()
    assert torch.equal(second, fresh)
    assert difference(first, second) > VISIBLE
    assert torch.equal(comparison.run(), compare(repository).run())
    assert [(record.video, record.chunk) for record in handle.report] == [(v, c) for v in (0, 1) for c in range(CHUNKS)]


def test_unpatching_restores(repository: Any) -> None:
    comparison, module = compare(repository), repository[0].attention
    native, generator = module.attention, comparison.model.generator
    before = {key: id(value) for key, value in vars(generator).items()}
    handle = tokentrim.patch(comparison.model, ObservePolicy())
    assert module.attention is not native
    assert len(generator._forward_hooks) > 0
    handle.unpatch()
    assert module.attention is native
    assert {key: id(value) for key, value in vars(generator).items()} == before
    assert len(generator._forward_hooks) + len(generator._forward_pre_hooks) == 0


def test_detection_is_unique(repository: Any) -> None:
    found = {found.adapter: found for found in tokentrim.detect(compare(repository).model)}
    assert [name for name, detection in found.items() if detection.matches] == ["longlive"]
    assert "this is LongLive" in found["self-forcing"].reason
    assert "this is LongLive" in found["memflow"].reason
