"""The real Rolling Forcing, patched: a forced prune equals the -inf reference, also through its windows in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import OTHERS, TOKENS, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_rolling_forcing import BLOCK, LAYERS, WINDOW, rolling_forcing, rolling_pipeline, source_of
from tiny_self_forcing import Repository
from tokentrim_hooks_adapters.rolling_forcing import RollingForcing
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy, Phase

pytestmark = [pytest.mark.upstream, pytest.mark.checks("rolling-forcing", "exact")]
Record = Callable[[str, Any], None]
BLOCKS = 9


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with rolling_forcing() as opened:
        yield opened


def compare(repository: Repository, blocks: int = BLOCKS, batch: int = 1) -> Comparison:
    """A pipeline and its noise; the anchor block is spared."""
    pipeline = rolling_pipeline(repository, batch)
    noise, prompts = noise_of(batch, blocks * BLOCK), ["a cat", "a dog by the sea"][:batch]

    def generate() -> Tensor:
        return pipeline.inference_rolling_forcing(noise, prompts, return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), range(BLOCK))


def window_of(chunk: int) -> int:
    """First frame of the window in which a block enters: all earlier blocks are clean in the cache."""
    return BLOCK * max(chunk - WINDOW + 1, 0)


CASES = {
    "first chunk with anything to prune": (BLOCKS, [6]),
    "full window, then the cache rolls": (BLOCKS, [7]),
    "two prunes, the last block to enter": (BLOCKS, [6, 8]),
    "prune before and after the cache rolls": (11, [8, 10]),
}


@pytest.mark.parametrize("name", CASES)
def test_prune_equals_masked_attention(repository: Repository, name: str, record_property: Record) -> None:
    blocks, where = CASES[name]
    comparison = compare(repository, blocks)
    forced = {chunk: [tokens] for chunk, tokens in zip(where, (TOKENS, OTHERS), strict=False)}
    ours, handle = comparison.patched(ForcedPolicy(forced))
    reference = comparison.reference([Prune(window_of(chunk), tokens) for chunk, tokens in forced.items()])
    comparison.exact(f"rolling forcing, {name}", record_property, ours, reference)
    assert pruned_at(handle) == where
    assert [record.start for record in handle.report] == [BLOCK * chunk for chunk in range(blocks)]


def test_replay_is_bit_identical_to_pruning_before_the_chunk(repository: Repository) -> None:
    comparison = compare(repository)
    ours, _ = comparison.patched(ForcedPolicy({7: [TOKENS]}))
    assert torch.equal(ours, comparison.reference([Prune(window_of(7), [TOKENS])], drop=True))
    assert difference(ours, comparison.run()) > VISIBLE


def test_tokens_come_back_without_persist(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository)
    ours, _ = comparison.patched(ForcedPolicy({7: [TOKENS]}, persist=False))
    reference = comparison.reference([Prune(window_of(7), [TOKENS], lasting=False)])
    comparison.exact("rolling forcing, persist=False", record_property, ours, reference)


def test_only_the_flagged_sample_is_pruned(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository, batch=2)
    ours, _ = comparison.patched(ForcedPolicy({7: [(), TOKENS]}))
    reference = comparison.reference([Prune(window_of(7), [(), TOKENS])])
    comparison.exact("rolling forcing, batch of 2", record_property, ours, reference)
    assert difference(ours[0], comparison.run()[0]) <= 2e-6


def test_context_is_recent_clean_blocks_only(repository: Repository) -> None:
    """Up to chunk 5 there is none but the anchor; at chunk 7 two blocks lie between the anchor and the window."""
    comparison = compare(repository)
    ours, handle = comparison.patched(ForcedPolicy({chunk: [TOKENS] for chunk in range(1, 6)}))
    assert torch.equal(ours, comparison.run())
    assert pruned_at(handle) == []
    _, handle = comparison.patched(ForcedPolicy({7: [TOKENS]}))
    assert [record.dead for record in handle.report if record.pruned] == [2 * BLOCK * len(TOKENS)]


def test_anchor_is_spared_unless_asked(repository: Repository, record_property: Record) -> None:
    comparison = compare(repository)
    spared, _ = comparison.patched(ForcedPolicy({7: [TOKENS]}))
    ours, handle = comparison.patched(ForcedPolicy({7: [TOKENS]}, prune_anchors=True))
    reference = comparison.reference([Prune(window_of(7), [TOKENS])], spared=())
    comparison.exact("rolling forcing, prune_anchors=True", record_property, ours, reference)
    assert difference(spared, ours) > VISIBLE
    assert [record.dead for record in handle.report if record.pruned] == [3 * BLOCK * len(TOKENS)]


def test_marks_leave_the_anchor_and_the_window_alone(repository: Repository) -> None:
    comparison = compare(repository)
    with tokentrim.patch(comparison.model, ForcedPolicy({8: [TOKENS]})):
        comparison.run()
        values = [layer["v"] for layer in comparison.model.kv_cache_clean]
        dead = [(~v[0, :, 0, 0].isfinite()).nonzero().flatten().tolist() for v in values]
    rolled = BLOCK * BLOCKS - 24  # more frames than the cache holds: marks move with their rows
    rows = [80 * frame + token for frame in range(BLOCK, window_of(8) - rolled) for token in TOKENS]
    assert dead == [rows] * LAYERS


def test_phases(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block enters, one is committed; the last windows let none in and refine the newest."""
    seen: list[Phase] = []
    native = RollingForcing.phase

    def spy(self: RollingForcing, call: Any, before: Any) -> Phase:
        seen.append(native(self, call, before))
        return seen[-1]

    monkeypatch.setattr(RollingForcing, "phase", spy)
    comparison = compare(repository)
    _, handle = comparison.patched(ForcedPolicy({}))
    expected = [Phase.FIRST, Phase.COMMIT] * BLOCKS + [Phase.REFINE, Phase.COMMIT] * (WINDOW - 1)
    assert [Phase.FIRST, *seen] == expected  # the first call of all is not asked about
    assert trace(handle) == [{"first": 1, "commit": 1}] * BLOCKS


@pytest.mark.parametrize("reference", ["window", "clean"])
def test_observing_is_bit_identical(repository: Repository, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RollingForcing, "reference_chunk", reference)
    comparison = compare(repository)
    expected, state = comparison.run(), torch.get_rng_state()
    with tokentrim.patch(comparison.model, ObservePolicy()) as handle:
        observed = comparison.run()
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(observed, expected)
    assert all(record.severity is not None for record in list(handle.report)[1:])


def test_drift_is_measured_against_the_chosen_chunk(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed from what the generator returned and was given."""
    outputs: list[Tensor] = []
    commits: list[Tensor] = []
    comparison = compare(repository)

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        clean = kwargs.get("updating_cache", False)
        (commits if clean else outputs).append(kwargs["noisy_image_or_video"] if clean else output[1])

    handle = comparison.model.generator.register_forward_hook(keep, with_kwargs=True)
    comparison.run()
    handle.remove()
    newest = outputs[7][:, -BLOCK:]
    others = {"window": outputs[7][:, -2 * BLOCK : -BLOCK], "clean": commits[6]}
    for name, other in others.items():
        monkeypatch.setattr(RollingForcing, "reference_chunk", name)
        _, report = comparison.patched(ForcedPolicy({}))
        assert report.report.records[7].severity == pytest.approx(severity(newest, other), rel=1e-4), name


def test_observers_get_the_block_that_the_record_names(repository: Repository) -> None:
    """Not the older block that the same window commits."""
    comparison = compare(repository)
    entered: list[Tensor] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not kwargs.get("updating_cache", False):
            entered.append(output[1][:, -BLOCK:])

    class Watch:
        def __init__(self) -> None:
            self.latents: list[Tensor] = []

        def on_chunk(self, records: Any, latents: Tensor) -> None:
            self.latents.append(latents)

    hook, watch = comparison.model.generator.register_forward_hook(keep, with_kwargs=True), Watch()
    with tokentrim.patch(comparison.model, ObservePolicy(), observers=[watch]):
        comparison.run()
    hook.remove()
    assert len(watch.latents) == BLOCKS
    assert all(torch.equal(seen, own) for seen, own in zip(watch.latents, entered, strict=False))


def severity(a: Tensor, b: Tensor) -> float:
    """Mean over tokens of the norm of the difference of temporal means, on the 8 x 10 patch grid of 2 x 2 pixels."""
    a, b = (x.mean(1).unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3) for x in (a, b))
    return float((a - b).norm(dim=-1).mean())


def test_second_video_starts_afresh(repository: Repository) -> None:
    comparison = compare(repository)
    fresh, _ = comparison.patched(ForcedPolicy({7: [OTHERS]}))
    policy = ForcedPolicy({7: [TOKENS]})
    with tokentrim.patch(comparison.model, policy) as handle:
        first = comparison.run()
        policy.replan({7: [OTHERS]})
        second = comparison.run()
        policy.replan({})
        third = comparison.run()
    assert torch.equal(second, fresh)
    assert torch.equal(third, comparison.run())
    assert difference(first, second) > VISIBLE
    counted = [(record.video, record.chunk) for record in handle.report]
    assert counted == [(video, chunk) for video in range(3) for chunk in range(BLOCKS)]


def test_unpatching_restores(repository: Repository) -> None:
    comparison = compare(repository)
    native, generator = repository.attention.attention, comparison.model.generator
    before = {key: id(value) for key, value in vars(generator).items()}
    hooks = [len(generator._forward_hooks), len(generator._forward_pre_hooks)]
    handle = tokentrim.patch(comparison.model, ForcedPolicy({7: [TOKENS]}))
    assert repository.attention.attention is not native
    handle.unpatch()
    assert repository.attention.attention is native
    assert {key: id(value) for key, value in vars(generator).items()} == before
    assert [len(generator._forward_hooks), len(generator._forward_pre_hooks)] == hooks


def test_detection_is_unique(repository: Repository) -> None:
    pipeline = rolling_pipeline(repository)
    found = {detection.adapter: detection for detection in tokentrim.detect(pipeline)}
    assert [name for name, detection in found.items() if detection.matches] == ["rolling-forcing"]
    assert "this is Rolling Forcing" in found["self-forcing"].reason
