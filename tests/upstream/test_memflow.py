"""The real MemFlow, patched: a prune equals the -inf reference, its memory bank is left alone and moved on but once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import TOLERANCE, VISIBLE, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_memflow import GRID, SETUP, TOKENS, BankSpared, memflow, memflow_pipeline, memflow_source
from tiny_self_forcing import Repository
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy

pytestmark = pytest.mark.upstream
DEAD = list(range(0, TOKENS, 10))
CHUNKS, CHUNK, SWITCH = 4, 2, 9
Run = Callable[[], Tensor]


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with memflow() as opened:
        yield opened


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "switch"])
def video(request: Any, repository: Repository) -> tuple[Any, Run, Tensor]:
    """A pipeline, a function that makes its video, and the video unpatched."""
    pipeline = memflow_pipeline(repository, interactive=request.param)
    noise = noise_of(1, 3 * CHUNKS, size=GRID)

    def generate() -> Tensor:
        torch.manual_seed(0)
        if not request.param:
            return pipeline.inference(noise, ["a cat"], return_latents=True)[1].clone()
        prompts = [["a cat"], ["a dog by the sea"]]
        return pipeline.inference(
            noise, text_prompts_list=prompts, switch_frame_indices=[SWITCH], return_latents=True
        )[1].clone()

    return pipeline, generate, generate()


def bank_of(pipeline: Any, seen: list[list[Tensor]]) -> Any:
    """Record the bank's V in front of every generator call that is not a replay's: one a call of the sampler."""

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append([layer["v"].clone() for layer in kwargs["kv_bank"]])

    return pipeline.generator.register_forward_pre_hook(look, with_kwargs=True)


def test_prune_equals_masked_attention(repository: Repository, video: Any, record_property: Any) -> None:
    pipeline, generate, unpruned = video
    prunes = [Prune(3 * CHUNK, [DEAD])]
    with BankSpared(memflow_source(repository, pipeline), prunes, range(SETUP.sink)) as reference:
        expected = generate()
    bank: list[list[Tensor]] = []
    watch = bank_of(pipeline, bank)
    with tokentrim.patch(pipeline, ForcedPolicy({CHUNK: [DEAD]})) as handle:
        ours = generate()
    watch.remove()
    effect, error = difference(expected, unpruned), difference(ours, expected)
    name = f"memflow 60 x 104, {'prompt switch' if len(bank) > 14 else 'plain'}, chunk {CHUNK}"
    print(f"{name:<58} effect {effect:.2e} error {error:.1e}")
    record_property("exact", (name, effect, error))
    assert effect > VISIBLE
    assert error <= TOLERANCE
    assert reference.bank_keys > 0  # copies of dead tokens do live on in the bank
    assert all(bool(layer.isfinite().all()) for layers in bank for layer in layers)
    assert pruned_at(handle) == [CHUNK]
    assert [{phase: record[phase] for phase in SETUP.trace()} for record in trace(handle)] == [SETUP.trace()] * CHUNKS
    assert [record.dead for record in handle.report if record.pruned] == [5 * len(DEAD)]  # six frames less the sink


def test_replay_is_bit_identical_to_pruning_before_the_chunk(repository: Repository, video: Any) -> None:
    pipeline, generate, _ = video
    source = memflow_source(repository, pipeline)
    with BankSpared(source, [Prune(3 * CHUNK, [DEAD])], range(SETUP.sink), drop=True):
        expected = generate()
    with tokentrim.patch(pipeline, ForcedPolicy({CHUNK: [DEAD]})):
        assert torch.equal(generate(), expected)


def test_observing_is_bit_identical_and_unpatching_restores(repository: Repository, video: Any) -> None:
    pipeline, generate, expected = video
    native, before = repository.attention.attention, {k: id(v) for k, v in vars(pipeline.generator).items()}
    state = torch.get_rng_state() if torch.equal(generate(), expected) else None
    with tokentrim.patch(pipeline, ObservePolicy()) as handle:
        assert repository.attention.attention is not native
        assert torch.equal(generate(), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(generate(), expected)
    assert repository.attention.attention is native
    assert {k: id(v) for k, v in vars(pipeline.generator).items()} == before
    assert [(record.video, record.chunk) for record in handle.report] == [(v, c) for v in (0, 1) for c in range(CHUNKS)]
    assert all(record.severity is not None for record in handle.report if record.chunk)


def test_replaying_does_not_move_the_bank_twice(video: Any) -> None:
    """The generator is called again with ``q_bank=False``, and with nothing else changed."""
    pipeline, generate, _ = video
    calls: list[dict[str, Any]] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    watch = pipeline.generator.register_forward_pre_hook(look, with_kwargs=True)
    with tokentrim.patch(pipeline, ForcedPolicy({CHUNK: [DEAD]})):
        generate()
    watch.remove()
    first, again = calls[3 * CHUNK], calls[3 * CHUNK + 1]
    assert (first["q_bank"], again["q_bank"]) == (True, False)
    assert all(again[name] is value for name, value in first.items() if name != "q_bank")


def test_detection_is_unique(video: Any) -> None:
    found = {found.adapter: found for found in tokentrim.detect(video[0])}
    assert [name for name, detection in found.items() if detection.matches] == ["memflow"]
    assert "this is MemFlow" in found["self-forcing"].reason
    assert "this is MemFlow" in found["longlive"].reason
