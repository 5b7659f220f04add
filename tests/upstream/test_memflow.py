"""The real MemFlow, patched: a prune equals the -inf reference, its memory bank is left alone and moved on but once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_memflow
import torch
from comparison import TOLERANCE, VISIBLE, difference, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_memflow import (
    GRID,
    LAYERS,
    SETUP,
    SMALL,
    TOKENS,
    BankSpared,
    memflow,
    memflow_pipeline,
    memflow_source,
    small_frames,
)
from tiny_self_forcing import Repository
from tokentrim_hooks_adapters.memflow import MemFlow
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Call, Phase, Seen

pytestmark = [pytest.mark.upstream, pytest.mark.checks("memflow", "exact")]
DEAD = list(range(0, TOKENS, 10))
CHUNKS, CHUNK, SWITCH = 4, 2, 9
CHUNKS_OF_SMALL, LATE = 10, 8


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with memflow() as opened:
        yield opened


Video = tuple[Any, Callable[[], Tensor]]


def plain(repository: Repository) -> Video:
    """A pipeline and a function that makes its video."""
    pipeline = memflow_pipeline(repository)

    def generate() -> Tensor:
        torch.manual_seed(0)
        return pipeline.inference(noise_of(1, 3 * CHUNKS, size=GRID), ["a cat"], return_latents=True)[1].clone()

    return pipeline, generate


def switching(repository: Repository) -> Video:
    """The same, and the prompt changes in front of chunk 3."""
    pipeline = memflow_pipeline(repository, interactive=True)

    def generate() -> Tensor:
        torch.manual_seed(0)
        _, latents = pipeline.inference(
            noise_of(1, 3 * CHUNKS, size=GRID), text_prompts_list=[["a cat"], ["a dog by the sea"]],
            switch_frame_indices=[SWITCH], return_latents=True,
        )  # fmt: skip
        return latents.clone()

    return pipeline, generate


@dataclass
class Watch:
    """What the generator was called with, replays included, and whether the bank was free of marks."""

    calls: list[dict[str, Any]]
    clean: list[bool]

    @classmethod
    @contextmanager
    def on(cls, pipeline: Any) -> Iterator[Watch]:
        """Watch the generator of ``pipeline``."""
        watch = cls([], [])

        def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            watch.calls.append({**kwargs, "shape": kwargs["noisy_image_or_video"].shape})
            watch.clean.append(all(bool(layer["v"].isfinite().all()) for layer in kwargs["kv_bank"]))

        hook = pipeline.generator.register_forward_pre_hook(look, with_kwargs=True)
        yield watch
        hook.remove()


def exact(name: str, record: Any, ours: Tensor, expected: Tensor, unpruned: Tensor) -> None:
    """Assert that ours equals the reference and that the prune was visible."""
    effect, error = difference(expected, unpruned), difference(ours, expected)
    record("exact", (f"memflow 60 x 104, {name}", effect, error))
    assert effect > VISIBLE
    assert error <= TOLERANCE


def test_two_videos_observed_then_pruned(repository: Repository, record_property: Any) -> None:
    pipeline, generate = plain(repository)
    source, prunes = memflow_source(repository, pipeline), [Prune(3 * CHUNK, [DEAD])]
    unpruned, state = generate(), torch.get_rng_state()
    with BankSpared(source, prunes, range(SETUP.sink)) as reference:
        masked = generate()
    assert reference.bank_keys > 0  # copies of dead tokens do live on in the bank
    with BankSpared(source, prunes, range(SETUP.sink), drop=True):
        dropped = generate()
    policy, native = ForcedPolicy({}), repository.attention.attention
    before = {key: id(value) for key, value in vars(pipeline.generator).items()}
    with tokentrim.patch(pipeline, policy) as handle:
        assert torch.equal(generate(), unpruned)
        policy.replan({CHUNK: [DEAD]})
        with Watch.on(pipeline) as watch:
            ours = generate()
        assert torch.equal(torch.get_rng_state(), state)
    exact(f"chunk {CHUNK}", record_property, ours, masked, unpruned)
    assert torch.equal(ours, dropped)
    assert repository.attention.attention is native
    assert {key: id(value) for key, value in vars(pipeline.generator).items()} == before
    assert [(record.video, record.chunk) for record in handle.report] == [(v, c) for v in (0, 1) for c in range(CHUNKS)]
    assert trace(handle) == [SETUP.trace()] * CHUNKS
    assert [record.dead for record in handle.report if record.pruned] == [5 * len(DEAD)]  # six frames less the sink
    check_replay(watch)


def check_replay(watch: Watch) -> None:
    """The bank carries no mark; it was moved on once per chunk, and not again for the two proofs or the replay."""
    assert all(watch.clean)
    first, again = watch.calls[3 * CHUNK], watch.calls[3 * CHUNK + 2]
    assert (first["q_bank"], again["q_bank"]) == (True, False)
    assert all(again[name] is value for name, value in first.items() if name not in ("q_bank", "shape"))
    assert sum(bool(call.get("q_bank")) for call in watch.calls) == CHUNKS
    assert len(watch.calls) == 3 * CHUNKS + 3


def test_prompt_switch(repository: Repository, record_property: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, generate = switching(repository)
    unpruned, phases, native = generate(), [Phase.FIRST], MemFlow.phase
    with BankSpared(memflow_source(repository, pipeline), [Prune(3 * CHUNK, [DEAD])], range(SETUP.sink)):
        masked = generate()

    def spy(self: MemFlow, call: Call, seen: Seen) -> Phase:
        phases.append(native(self, call, seen))
        return phases[-1]

    monkeypatch.setattr(MemFlow, "phase", spy)
    with tokentrim.patch(pipeline, ForcedPolicy({CHUNK: [DEAD]})) as handle, Watch.on(pipeline) as watch:
        ours = generate()
    exact(f"chunk {CHUNK}, then a prompt switch", record_property, ours, masked, unpruned)
    assert all(watch.clean)
    chunk = [Phase.FIRST, Phase.REFINE, Phase.COMMIT]
    assert phases == [*chunk * 3, Phase.RECACHE, *chunk]
    assert [record.mean is None for record in handle.report] == [True, True, False, True]


def test_heads_that_choose_among_sink_and_bank(monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """``SMA``: each head routes to three frames of sink and bank. Exact while all choose alike; refused where not.

    A bank's frame may still be a row of the window, and then a key is that row in some heads and another in others.
    """
    monkeypatch.setattr(tiny_memflow, "HEADS", 2)
    with small_frames() as repository:
        pipeline = memflow_pipeline(repository, tokens=SMALL)
        for block in pipeline.generator.model.blocks:
            block.self_attn.SMA = True
        routed = spied(monkeypatch, type(pipeline.generator.model.blocks[0].self_attn))

        def generate() -> Tensor:
            torch.manual_seed(0)
            noise = noise_of(1, 3 * CHUNKS_OF_SMALL, size=(16, 20))
            return pipeline.inference(noise, ["a cat"], return_latents=True)[1].clone()

        dead = list(range(0, SMALL, 10))
        unpruned, source = generate(), memflow_source(repository, pipeline, SMALL)
        assert any(routed[-LAYERS:]) and not any(routed[: LAYERS * 3 * CHUNK]), "heads choose alike at first"
        with BankSpared(source, [Prune(3 * CHUNK, [dead])], range(SETUP.sink)):
            masked = generate()
        with tokentrim.patch(pipeline, ForcedPolicy({CHUNK: [dead]})) as handle, Watch.on(pipeline) as watch:
            ours = generate()
        assert all(watch.clean) and handle.report.triggers == 1
        with tokentrim.patch(pipeline, ForcedPolicy({LATE: [dead]})), pytest.raises(
            tokentrim.UnsupportedContextError, match="in some heads only"
        ):
            generate()
    exact("heads that choose alike", record_property, ours, masked, unpruned)


def spied(monkeypatch: pytest.MonkeyPatch, attention: type) -> list[bool]:
    """Whether heads were given different frames, call by call: by the positions of what they were given."""
    native, apart = attention.dynamic_topk_routing_attention, []

    def route(self: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        place = torch.arange(float(key.shape[1])).view(1, -1, 1, 1).expand_as(value)
        given = native(self, query=query, key=key, value=place, **options)[1]
        apart.append(not torch.equal(given[:, :, 0], given[:, :, 1]))
        return native(self, query=query, key=key, value=value, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(attention, "dynamic_topk_routing_attention", route)
    return apart


def test_detection_is_unique(repository: Repository) -> None:
    found = {found.adapter: found for found in tokentrim.detect(memflow_pipeline(repository))}
    assert [name for name, detection in found.items() if detection.matches] == ["memflow"]
    assert "this is MemFlow" in found["self-forcing"].reason
    assert "this is MemFlow" in found["longlive"].reason
