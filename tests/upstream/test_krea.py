"""The real Krea realtime-video: its pipeline, and its server's loop (written after ``release_server.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fork_checks
import pytest
import torch
from comparison import OTHERS, TOKENS, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune, fingerprints, masked_attention
from tiny_forks import krea, krea_pipeline
from tiny_self_forcing import Repository, Setup, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim

pytestmark = [pytest.mark.upstream, pytest.mark.checks("krea-realtime", "exact")]
Record = Callable[[str, Any], None]
TOKENS_A_FRAME = 80


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with krea() as opened:
        yield opened


def through_pipeline(repository: Repository, setup: Setup, chunks: int) -> Comparison:
    pipeline = krea_pipeline(repository, setup)

    def generate() -> Tensor:
        return pipeline.inference(noise_of(1, chunks * setup.block), ["a cat"], return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), setup.spared())


class Session:
    """The server's loop over blocks: fill the cache from finished frames, then denoise; the first frame is kept."""

    def __init__(self, pipeline: Any, window: int) -> None:
        self.pipeline, self.window = pipeline, window
        self.steps = pipeline.denoising_step_list
        self.condition = pipeline.text_encoder(text_prompts=["a cat"])

    def call(self, latents: Tensor, timestep: Tensor, start: int) -> Tensor:
        _, x0 = self.pipeline.generator(
            noisy_image_or_video=latents, conditional_dict=self.condition, timestep=timestep,
            kv_cache=self.pipeline.kv_cache1, crossattn_cache=self.pipeline.crossattn_cache,
            current_start=start * TOKENS_A_FRAME,
        )  # fmt: skip
        return x0

    def fill(self, done: Tensor) -> int:
        """Empty the cache and fill it in one masked call; returns the place that the next block takes."""
        for layer in self.pipeline.kv_cache1:
            layer["k"].zero_()
            layer["v"].zero_()
            layer["global_end_index"] = layer["local_end_index"] = 0
        if not done.shape[1]:
            return 0
        context = torch.cat([done[:, :1], done[:, 1:][:, -self.window + 1 :]], dim=1)
        model = self.pipeline.generator.model
        model.block_mask = model._prepare_blockwise_causal_attn_mask(
            device="cpu", num_frames=context.shape[1], frame_seqlen=TOKENS_A_FRAME, num_frame_per_block=3,
            local_attn_size=-1,
        )  # fmt: skip
        start = min(done.shape[1], self.window)
        self.call(context, torch.zeros(1, context.shape[1]), start)
        model.block_mask = None
        return start

    def generate(self, chunks: int) -> Tensor:
        done, noise = torch.zeros(1, 0, 16, 16, 20), noise_of(1, 3 * chunks)
        for layer in self.pipeline.crossattn_cache:
            layer["is_init"] = False
        for chunk in range(chunks):
            start, noisy = self.fill(done), noise[:, 3 * chunk : 3 * chunk + 3]
            for index, step in enumerate(self.steps):
                x0 = self.call(noisy, torch.ones(1, 3) * step, start)
                if index + 1 < len(self.steps):
                    flat, level = x0.flatten(0, 1), self.steps[index + 1] * torch.ones(3)
                    noisy = self.pipeline.scheduler.add_noise(flat, torch.randn_like(flat), level).unflatten(0, (1, 3))
            done = torch.cat([done, x0], dim=1)
        return done


SERVED = Setup(capacity=9)


def through_server(repository: Repository, chunks: int, window: int = 6) -> Comparison:
    pipeline = krea_pipeline(repository, SERVED)
    for block in pipeline.generator.model.blocks:
        block.self_attn.max_attention_size = 21 * TOKENS_A_FRAME
    session = Session(pipeline, window)
    source = source_of(repository, pipeline)
    return Comparison(lambda: session.generate(chunks), pipeline.generator, source, range(1))


@pytest.mark.parametrize("setup", [Setup(), Setup(window=9, sink=3)], ids=["global", "local 9 sink 3"])
def test_pipeline_prune_equals_masked_attention(
    repository: Repository, setup: Setup, record_property: Record
) -> None:
    comparison = through_pipeline(repository, setup, 6)
    ours, handle = comparison.patched(ForcedPolicy({4: [TOKENS]}))
    reference = comparison.reference([Prune(12, [TOKENS])])
    comparison.exact(f"Krea, pipeline, window {setup.window}", record_property, ours, reference)
    assert pruned_at(handle) == [4]
    assert trace(handle) == [setup.trace()] * 6


def test_what_every_fork_must_show(repository: Repository) -> None:
    comparison = through_pipeline(repository, Setup(window=9, sink=1), 5)
    fork_checks.detected(comparison, "krea-realtime")
    fork_checks.neutral(comparison, chunks=5)
    fork_checks.replayed(comparison, chunk=3, block=3)
    fork_checks.restored(comparison, chunk=3)


def served_reference(comparison: Comparison, plan: dict[int, Any]) -> Tensor:
    """Keys are dead, by their bits, in the denoising calls of the planned blocks only; the filled cache is new.

    Blocks are counted by fillings, for ``current_start`` stands still; the filled first frame is spared.
    """
    source = comparison.source
    model, tokens = source.generator.model, source.tokens
    state = {"block": -1, "filled": True}

    def before(*_: Any) -> None:
        if model.block_mask is not None:
            state.update(filled=True)
        elif state["filled"]:
            state.update(block=state["block"] + 1, filled=False)

    filled: list[Tensor] = []

    def remember(_module: Any, _args: Any, output: Tensor) -> None:
        if model.block_mask is not None:
            per_frame = fingerprints(output).unflatten(1, (-1, tokens))
            filled.append(per_frame)

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        marks, dead = fingerprints(v), torch.zeros(v.shape[:2], dtype=torch.bool)
        for chosen in plan.get(state["block"], []):
            for per_frame in filled[-len(source.values) :]:
                dead |= torch.isin(marks, per_frame[:, 1:, list(chosen)])
        return masked_attention(q, k, v, dead)

    hooks = [source.generator.register_forward_pre_hook(before)]
    hooks += [value.register_forward_hook(remember) for value in source.values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source.namespace, "attention", attention)
        latents = comparison.run()
    for hook in hooks:
        hook.remove()
    return latents


SERVER = {
    "window still growing": {1: [TOKENS]},
    "current_start stands still": {4: [TOKENS]},
    "two successive blocks": {3: [TOKENS], 4: [OTHERS]},
}


@pytest.mark.parametrize("persist", [True, False])
@pytest.mark.parametrize("name", SERVER)
def test_server_prune_equals_masked_attention(
    repository: Repository, name: str, persist: bool, record_property: Record
) -> None:
    """Tokens come back when the cache is filled anew, whatever ``persist`` says."""
    plan = SERVER[name]
    comparison = through_server(repository, 6)
    ours, handle = comparison.patched(ForcedPolicy(plan, persist=persist))
    reference = served_reference(comparison, plan)
    comparison.exact(f"Krea, server, {name}, persist={persist}", record_property, ours, reference)
    assert pruned_at(handle) == sorted(plan)
    assert [record.start for record in handle.report] == list(range(0, 18, 3))
    assert trace(handle) == [SERVED.trace()] * 5 + [{"first": 1, "refine": 1}]


def test_server_neutral_and_restored(repository: Repository) -> None:
    comparison = through_server(repository, 5)
    fork_checks.neutral(comparison, chunks=5)
    pruned, _ = comparison.patched(ForcedPolicy({3: [TOKENS]}))
    plain = comparison.run()
    assert difference(pruned, plain) > VISIBLE
    assert torch.equal(plain, through_server(repository, 5).run())


def test_second_session_starts_afresh(repository: Repository) -> None:
    comparison = through_server(repository, 4)
    policy = ForcedPolicy({3: [TOKENS]})
    with tokentrim.patch(comparison.model, policy) as handle:
        first = comparison.run()
        assert torch.equal(comparison.run(), first)
    assert [(record.video, record.chunk) for record in handle.report] == [(v, c) for v in (0, 1) for c in range(4)]
