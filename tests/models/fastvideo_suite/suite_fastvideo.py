"""The FastVideo adapter on FastVideo's own transformer and stage. Run by :mod:`test_foreign`, in its own process."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from counting import what_observing_adds
from tokentrim_hooks_adapters.fastvideo import FastVideo, FastVideoPair
from torch import Tensor, nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing.attention import watch_attention
from tokentrim_hooks.testing.checks import run_with_dead_keys
from tokentrim_hooks.testing.conformance import AdapterConformance
from tokentrim_hooks.testing.fingerprint import assert_same, fingerprint
from tokentrim_hooks.testing.policies import ForcedPolicy

PHASES = {"first": 1, "refine": 2, "commit": 1}
DEAD = (0, 5, 11, 20)


class Kit(AdapterConformance):
    """The kit cannot know that the denoiser predicts flow: what is halved is x0, as the loop makes it of the flow."""

    def _halved(self, call: int, seed: int) -> Tensor:
        model, count = self.make_model(), [-1]
        convert = tiny.causal_denoising.pred_noise_to_pred_video

        def halve(*given: Any, **named: Any) -> Tensor:
            count[0] += 1
            return convert(*given, **named) / (2 if count[0] + count[0] // len(tiny.STEPS) == call else 1)

        with mock.patch.object(tiny.causal_denoising, "pred_noise_to_pred_video", halve):
            return self.run(model, seed)


class TestAbsolute(Kit):
    """Roped K in the cache; 7 chunks of 2 frames through a window of 6 with one sink frame, so rows roll."""

    adapter = FastVideo
    chunks, chunk_to_prune, tokens, anchor_frames = 6, 4, DEAD, 1

    def make_model(self) -> Any:
        return tiny.Float32Stage()

    def run(self, model: Any, seed: int) -> Tensor:
        return model(seed, self.chunks)


class TestRelativistic(TestAbsolute):
    """Raw K in the cache, roped anew at every call."""

    def make_model(self) -> Any:
        return tiny.Float32Stage("relativistic")


class TestRealStage(Kit):
    """FastVideo's own CausalDMDDenosingStage. It computes in bfloat16, and so does the comparison."""

    adapter = FastVideo
    chunks, chunk_to_prune, tokens, anchor_frames = 6, 4, DEAD, 1
    tolerance = 3e-2

    def make_model(self) -> Any:
        return tiny.real_stage()

    def run(self, model: Any, seed: int) -> Tensor:
        return tiny.run_real_stage(model, seed, self.chunks)


# Name, options, probe, chunk that is pruned, anchors, rows that die a layer: 4 tokens of 3 (2) chunks' prunable frames.
CONFIGURATIONS = [
    ("absolute", {}, "first-step", 4, 1, 4 * 3),
    ("absolute, whole-chunk probe", {}, "candidate", 4, 1, 4 * 3),
    ("relativistic", {"policy": "relativistic"}, "first-step", 4, 1, 4 * 3),
    ("relativistic, no sink", {"policy": "relativistic", "sinks": 0}, "first-step", 5, 0, 4 * 4),
    ("int indices, window not full", {"sinks": 0, "ints": True}, "first-step", 2, 0, 4 * 4),
]


@pytest.mark.checks("fastvideo", "exact")
@pytest.mark.parametrize(("name", "options", "probe", "chunk", "anchors", "dead"), CONFIGURATIONS)
def test_equals_minus_infinity(
    name: str, options: dict[str, Any], probe: Any, chunk: int, anchors: int, dead: int, record_property: Any
) -> None:
    """Largest difference to the kit's -inf reference, which finds keys by value, beside the effect of the prune."""
    model = tiny.Float32Stage(**options)
    plain = model(9, 7)
    expected = run_with_dead_keys(lambda: model(9, 7), [model.transformer], chunk, DEAD, tiny.TOKENS, anchors)
    with tokentrim.patch(model, ForcedPolicy({chunk: DEAD}), probe=probe) as handle:
        actual = model(9, 7)
    error, effect = float((actual - expected).abs().max()), float((expected - plain).abs().max())
    record_property("figure", f"fastvideo {name}: effect {effect:.2e} error {error:.1e}")
    record_property("exact", (name, effect, error))
    assert effect > 1e-2 and error <= 1e-5
    assert [record.phases for record in handle.report] == [PHASES] * 7
    assert [record.dead for record in handle.report] == [dead if n == chunk else 0 for n in range(7)]


def test_replay_equals_pruning_before_the_chunk() -> None:
    """Bit for bit: a chunk whose context was pruned beforehand gives what judge, prune and replay give."""
    model = tiny.Float32Stage()
    seen: list[Tensor] = []
    model.transformer.register_forward_hook(lambda _m, _a, _k, out: seen.append(out), with_kwargs=True)
    with tokentrim.patch(model, ForcedPolicy({4: DEAD})):
        model(3, 5)
    # Behind the chunk's first call, the same with other latents (where are rows?), and once more with nothing pruned.
    replayed = seen[4 * 4 + 3 :]
    assert torch.equal(seen[4 * 4], seen[4 * 4 + 2]) and not torch.equal(seen[4 * 4], seen[4 * 4 + 1])
    again = tiny.Float32Stage()
    with torch.no_grad(), _keys_taken_out([again.transformer], start=8):
        expected: list[Tensor] = []
        again.transformer.register_forward_hook(lambda _m, _a, _k, out: expected.append(out), with_kwargs=True)
        again(3, 5)
    assert len(replayed) == len(expected[16:]) == 4
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected[16:], strict=True))


class _keys_taken_out:
    """From the chunk at ``start`` on, take tokens DEAD of all earlier frames but the sink out, by their place.

    Bookkeeping of its own: the window holds frame 0, then the latest 5 frames, rows in order.
    """

    def __init__(self, transformers: list[Any], start: int) -> None:
        self.transformers, self.start, self.frames, self.undo = transformers, start, list[int](), list[Any]()

    def __enter__(self) -> None:
        for transformer in self.transformers:
            self.undo.append(transformer.register_forward_pre_hook(self._begin, with_kwargs=True))
            for block in transformer.blocks:
                self.undo.append(block.attn1.attn.register_forward_pre_hook(self._take_out))

    def _begin(self, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        end = kwargs["start_frame"] + args[0].shape[2]
        self.frames = list(range(end)) if end <= tiny.WINDOW else [0, *range(end - tiny.WINDOW + 1, end)]
        self.pruned = kwargs["start_frame"] >= self.start

    def _take_out(self, _module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        if not self.pruned:
            return None
        q, k, v = args
        rows = [(frame, token) for frame in self.frames for token in range(tiny.TOKENS)]
        assert len(rows) == k.shape[1]
        live = [i for i, (frame, token) in enumerate(rows) if not (0 < frame < self.start and token in DEAD)]
        return q, k[:, live], v[:, live]

    def __exit__(self, *_: object) -> None:
        for handle in self.undo:
            handle.remove()


def test_x0_is_what_the_stage_makes_of_the_flow() -> None:
    """Within bfloat16, the judged prediction is the stage's own x0."""
    stage, predicted, made = tiny.real_stage(), [], []
    convert = tiny.causal_denoising.pred_noise_to_pred_video

    class Watching(ForcedPolicy):
        def judge(self, chunk: tokentrim.Chunk, history: Any) -> Any:
            predicted.append(float(chunk.drift.mean()))
            return super().judge(chunk, history)

    def noted(**given: Any) -> Tensor:
        made.append(convert(**given))
        return made[-1]

    tiny.causal_denoising.pred_noise_to_pred_video = noted
    try:
        with tokentrim.patch(stage, Watching()):
            video = tiny.run_real_stage(stage, 0, 5)
    finally:
        tiny.causal_denoising.pred_noise_to_pred_video = convert
    for chunk in range(1, 5):
        before = _summary(video[:, :, 2 * chunk - 2 : 2 * chunk].transpose(1, 2))
        first = _summary(made[3 * chunk].unflatten(0, (1, -1)))
        assert predicted[chunk - 1] == pytest.approx(float((first - before).norm(dim=-1).mean()), rel=2e-2)


def _summary(chunk: Tensor) -> Tensor:
    """[B, F, C, H, W] -> [B, N, D], written out."""
    mean = chunk.double().mean(1)
    patches = nn.functional.unfold(mean, kernel_size=2, stride=2)
    return patches.transpose(1, 2)


@pytest.mark.checks("fastvideo-pair", "exact")
@pytest.mark.checks("fastvideo-pair", "undone")
def test_two_transformers_have_two_contexts_and_both_are_pruned(record_property: Any) -> None:
    """Wan2.2: high noise and low noise each with its cache; the first block has one frame."""
    stage = tiny.real_stage(boundary=0.9)
    plain = tiny.run_real_stage(stage, 1, 5, 0.9)
    before = fingerprint(stage)
    match = FastVideoPair.probe(stage)
    assert isinstance(FastVideo.probe(stage), tokentrim.NoMatch)
    assert isinstance(match, tokentrim.Match) and match.also == (stage.transformer_2,)
    with (
        watch_attention([stage.transformer]) as high,
        watch_attention([stage.transformer_2]) as low,
        tokentrim.patch(stage, ForcedPolicy({3: DEAD})) as handle,
    ):
        pruned = tiny.run_real_stage(stage, 1, 5, 0.9)
    assert_same(before, fingerprint(stage))
    records = list(handle.report)
    assert [(r.start, r.frames) for r in records] == [(0, 1), (1, 2), (3, 2), (5, 2), (7, 2)]
    assert [r.phases for r in records] == [{"first": 1, "commit": 1}] * 5  # the low-noise calls are a branch
    # High noise: 3 frames behind the sink. Low noise: 4, for its cache is pruned before the call that evicts one.
    assert [r.dead for r in records] == [0, 0, 0, 4 * 3 + 4 * 4, 0]
    assert not torch.equal(plain, pruned) and torch.isfinite(pruned).all()
    for kernels in (high, low):
        own = [one for one in kernels if one.rows]
        assert all(one.finite for one in own)
        assert min(one.keys for one in own[len(own) // 2 :]) < tiny.WINDOW * tiny.TOKENS
    assert torch.equal(plain, tiny.run_real_stage(stage, 1, 5, 0.9))
    with _keys_taken_out([stage.transformer, stage.transformer_2], start=5):
        expected = tiny.run_real_stage(stage, 1, 5, 0.9)
    effect = float((expected - plain).abs().max())
    record_property("figure", f"fastvideo two transformers, bfloat16 (drop): effect {effect:.2e} error 0")
    record_property("exact", ("two transformers, bfloat16", effect, float((pruned - expected).abs().max())))
    assert effect > 1e-2 and torch.equal(pruned, expected)


@pytest.mark.checks("fastvideo-pair", "neutral")
def test_observing_two_transformers_changes_no_bit() -> None:
    stage = tiny.real_stage(boundary=0.9)
    plain = tiny.run_real_stage(stage, 1, 5, 0.9)
    with tokentrim.patch(stage, tokentrim.ObservePolicy()) as handle:
        assert torch.equal(plain, tiny.run_real_stage(stage, 1, 5, 0.9))
    assert [record.severity is not None for record in handle.report] == [False] + [True] * 4


def test_two_transformers_take_policies_that_judge_and_no_others() -> None:
    """Which calls of the second commit is not told apart, and a whole chunk cannot be replayed on one of two caches."""
    stage = tiny.real_stage(boundary=0.9)
    with pytest.raises(tokentrim.UnsupportedProbeError, match="first-step"):
        tokentrim.patch(stage, ForcedPolicy({3: DEAD}), probe="candidate")
    for policy in (tokentrim.CommitWindow(), tokentrim.LatentMoments(), tokentrim.RowMoments()):
        with pytest.raises(tokentrim.UnsupportedPolicyError, match="fastvideo-pair"):
            tokentrim.patch(stage, policy)


def test_a_loop_that_follows_the_flow_takes_no_correction() -> None:
    """FastVideo's other stage hands the flow to its scheduler: a corrected x0 would be lost, and that is said."""
    stage = tiny.causal_denoising.CausalDenoisingStage(tiny.transformer(), tiny.scheduler())
    call, x0 = SimpleNamespace(timestep=torch.ones(1, 1)), torch.zeros(1, 2, 16, 8, 12)
    words = r"CausalDenoisingStage\.forward does not call"
    with (
        tokentrim.patch(stage, tokentrim.LatentMoments()) as handle,
        pytest.raises(tokentrim.UnsupportedPolicyError, match=words),
    ):
        handle.adapter.with_prediction(call, None, x0)


def test_a_composed_pipeline_is_recognised_by_its_stage() -> None:
    """``pipeline.stages`` holds other stages too; the bare transformer works as well, and strangers are refused."""
    stage = tiny.real_stage()
    pipeline = SimpleNamespace(stages=[SimpleNamespace(), stage], modules={})
    matching = [found.adapter for found in tokentrim.detect(pipeline) if found.matches]
    assert matching == ["fastvideo"]
    assert [found.adapter for found in tokentrim.detect(stage.transformer) if found.matches] == ["fastvideo"]
    stage.transformer.blocks[0].attn1.rope_cache_policy = "block_relativistic"
    answer = FastVideo.probe(stage)
    assert isinstance(answer, tokentrim.NoMatch) and "block_relativistic" in answer.reason


OPS = 92
"""Operations that observing adds to a chunk, at most; see tests/adapters/test_ops.py."""


def test_what_observing_adds(record_property: Any) -> None:
    """In numbers that do not depend on the machine: they may fall, they may not grow unseen."""
    ops, syncs, log = what_observing_adds(tiny.Float32Stage, lambda stage: stage(0, 6), record_property, "fastvideo")
    assert OPS - 1 < ops <= OPS and syncs <= 1, (ops, syncs, str(log))


STRANGERS = {
    "matrixgame2.causal_model:CausalMatrixGame2WanModel": "kv_cache_mouse, kv_cache_keyboard: Matrix-Game 2",
    "matrixgame3.model:MatrixGame3WanModel": "this is Matrix-Game 3",
    "dreamx_world_ar:DreamXWorldARTransformer3DModel": "this is DreamX-World",
}
"""Causal models of FastVideo's that no adapter knows, and what is said of them."""


@pytest.mark.parametrize("path", STRANGERS)
@pytest.mark.parametrize("composed", [False, True], ids=["transformer", "pipeline"])
def test_relatives_are_refused_by_name(path: str, composed: bool) -> None:
    """Empty shells of the real classes: they are told by what their methods take."""
    home, _, kind = path.partition(":")
    model = nn.Module()
    model.__class__ = getattr(importlib.import_module(f"fastvideo.models.dits.{home}"), kind)
    given = SimpleNamespace(stages=[SimpleNamespace(), SimpleNamespace(transformer=model)]) if composed else model
    with pytest.raises(tokentrim.UnsupportedModelError, match=STRANGERS[path]):
        tokentrim.patch(given)
