"""The LingBot-World adapter on FastVideo's own transformer and stage. Run by :mod:`test_foreign`."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_lingbot
import torch
from counting import what_observing_adds
from tokentrim_hooks_adapters import _flow_stage
from tokentrim_hooks_adapters.lingbot_world import LingBotWorld
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing.checks import run_with_dead_keys
from tokentrim_hooks.testing.conformance import AdapterConformance
from tokentrim_hooks.testing.policies import ForcedPolicy

PHASES = {"first": 1, "refine": 3, "commit": 1}
DEAD = (0, 5, 11, 20)


class TestStage(AdapterConformance):
    """The stage's own loop: 8 chunks of 2 frames through a window of 6 behind one sink frame, so rows roll."""

    adapter = LingBotWorld
    chunks, chunk_to_prune, tokens, anchor_frames = 8, 4, DEAD, 1
    own_files = (_flow_stage.__file__,)

    def make_model(self) -> Any:
        return tiny_lingbot.stage()

    def run(self, model: Any, seed: int) -> Tensor:
        return tiny_lingbot.run(model, seed, self.chunks)

    def delivered(self, result: Tensor) -> Tensor:
        return result.transpose(1, 2)  # there are as many frames as channels

    def _halved(self, call: int, seed: int) -> Tensor:
        """The kit cannot know that the denoiser predicts flow: half of the stage's own x0, at its fourth step."""
        model = self.make_model()
        convert, count = model._convert_flow_pred_to_x0, [-1]

        def halve(*given: Any) -> Tensor:
            count[0] += 1
            return convert(*given) / (2 if count[0] + count[0] // 4 == call else 1)

        model._convert_flow_pred_to_x0 = halve
        return self.run(model, seed)


# Name, options of the model, of the patch, chunk that is pruned, anchors, rows that die a layer.
CONFIGURATIONS = [
    ("one sink", {}, {}, 4, 1, 4 * 3),
    ("no sink", {"sinks": 0}, {}, 5, 0, 4 * 4),
    ("window not full", {"sinks": 0}, {}, 2, 0, 4 * 4),
    ("a window that chunks do not fill evenly", {"window": 7, "sinks": 2}, {}, 5, 2, 4 * 3),
    ("no window", {"window": -1, "sinks": 0}, {}, 4, 0, 4 * 8),
    ("whole-chunk probe", {}, {"probe": "candidate"}, 4, 1, 4 * 3),
    ("bare transformer", {}, {}, 4, 1, 4 * 3),
]


@pytest.mark.parametrize(("name", "options", "how", "chunk", "anchors", "dead"), CONFIGURATIONS)
def test_equals_minus_infinity(
    name: str, options: Any, how: Any, chunk: int, anchors: int, dead: int, record_property: Any
) -> None:
    """Largest difference to the kit's -inf reference, which finds keys by value, beside the effect of the prune."""
    model = tiny_lingbot.stage(**options)

    def run() -> Tensor:
        return tiny_lingbot.run(model, 9, 7)

    plain = run()
    expected = run_with_dead_keys(run, [model.transformer], chunk, DEAD, tiny_lingbot.TOKENS, anchors)
    patched = model.transformer if name == "bare transformer" else model  # then only timesteps tell what a call does
    with tokentrim.patch(patched, ForcedPolicy({chunk: DEAD}), **how) as handle:
        actual = run()
    error, effect = float((actual - expected).abs().max()), float((expected - plain).abs().max())
    record_property("figure", f"lingbot-world {name}: effect {effect:.2e} error {error:.1e}")
    assert effect > 1e-2 and error <= 1e-5
    assert [record.phases for record in handle.report] == [PHASES] * 7
    assert [record.dead for record in handle.report] == [dead if n == chunk else 0 for n in range(7)]


def test_x0_is_the_stages_own() -> None:
    """Bit for bit: what is judged, and what a corrected x0 becomes, is what the stage computes from the flow."""
    stage, judged, made = tiny_lingbot.stage(), [], []
    convert = stage._convert_flow_pred_to_x0

    def noted(*given: Any) -> Tensor:
        made.append(convert(*given))
        return made[-1]

    stage._convert_flow_pred_to_x0 = noted
    with tokentrim.patch(stage, tokentrim.ObservePolicy()) as handle:
        prediction = handle.adapter.prediction

        def watched(call: Any, output: Any) -> Tensor:
            judged.append(prediction(call, output))
            back = handle.adapter.with_prediction(call, output, judged[-1]) if call.timestep.any() else list(output)
            assert torch.allclose(torch.stack(back), torch.stack(output), atol=1e-5)
            return judged[-1]

        handle.adapter.prediction = watched
        tiny_lingbot.run(stage, 0, 3)
    steps = [x0[0].transpose(0, 1) for x0 in judged]
    assert all(any(torch.equal(x0, step) for step in steps) for x0 in made) and len(made) == 12


def test_pipeline_stage_and_bare_transformer_are_recognised() -> None:
    """By this adapter alone; calls made otherwise than the stage makes them are refused with what to do."""
    stage = tiny_lingbot.stage()
    for model in (SimpleNamespace(stages=[SimpleNamespace(), stage]), stage, stage.transformer):
        assert [found.adapter for found in tokentrim.detect(model) if found.matches] == ["lingbot-world"]
    with tokentrim.patch(stage), pytest.raises(tokentrim.UnsupportedContextError, match="as its stage does"):
        stage.transformer(torch.zeros(1, 16, 2, 8, 12), timestep=torch.ones(1), kv_cache=[])


OPS = 114
"""Operations that observing adds to a chunk, at most; see tests/adapters/test_ops.py."""


def test_what_observing_adds(record_property: Any) -> None:
    """In numbers that do not depend on the machine: they may fall, they may not grow unseen."""
    ops, syncs, log = what_observing_adds(
        tiny_lingbot.stage, lambda stage: tiny_lingbot.run(stage, 0, 6), record_property, "lingbot-world"
    )
    assert OPS - 1 < ops <= OPS and syncs <= 1, (ops, syncs, str(log))


class Turns:
    """Two threads that take turns whenever an x0 has been made, so that both have one that is not committed yet."""

    def __init__(self) -> None:
        self._changed, self._now, self._left = threading.Condition(), 0, {0, 1}

    def take(self) -> None:
        """Let the other one go on, and wait until it does so."""
        me = int(threading.current_thread().name[-1])
        with self._changed:
            self._pass_on(me)
            self._changed.wait_for(lambda: self._now == me or len(self._left) == 1, timeout=60)

    def leave(self) -> None:
        """The video is made."""
        me = int(threading.current_thread().name[-1])
        with self._changed:
            self._left.discard(me)
            self._pass_on(me)

    def _pass_on(self, me: int) -> None:
        self._now = 1 - me
        self._changed.notify_all()


def in_turns(stage: Any, seeds: tuple[int, int]) -> list[Tensor]:
    """Two videos of one stage, each in a thread of its own, call by call."""
    turns, videos, convert = Turns(), {}, stage._convert_flow_pred_to_x0

    def convert_and_wait(*given: Any) -> Tensor:
        x0 = convert(*given)
        turns.take()
        return x0

    def make(seed: int) -> None:
        try:
            videos[seed] = tiny_lingbot.run(stage, seed, 5)
        finally:
            turns.leave()

    threads = [threading.Thread(target=make, args=(seed,), name=f"video {n}") for n, seed in enumerate(seeds)]
    stage._convert_flow_pred_to_x0 = convert_and_wait
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    stage._convert_flow_pred_to_x0 = convert
    return [videos[seed] for seed in seeds]


def _told_apart() -> Any:
    """A stage that keeps whether text was read for each thread; as shipped, the second video is wrong unpatched."""
    here = threading.local()
    read = property(lambda _: getattr(here, "read", False), lambda _, value: setattr(here, "read", value))
    stage = tiny_lingbot.stage()
    stage.__class__ = type("Stage", (type(stage),), {"_cross_attn_initialized": read})
    return stage


def test_two_videos_in_turns_on_one_stage_are_what_they_are_alone() -> None:
    """The x0 that was made last may be the other video's: a commit is known by its own."""
    stage, policy = _told_apart(), ForcedPolicy({2: DEAD})
    alone = [tiny_lingbot.run(stage, seed, 5) for seed in (9, 10)]
    assert [a.equal(b) for a, b in zip(in_turns(_told_apart(), (9, 10)), alone, strict=True)] == [True, True]
    with tokentrim.patched(stage, policy):
        pruned = [tiny_lingbot.run(stage, seed, 5) for seed in (9, 10)]
    stage = _told_apart()
    with tokentrim.patched(stage, policy) as handle:
        found = in_turns(stage, (9, 10))
    assert [record.phases for record in handle.report] == [PHASES] * 10
    assert handle.report.triggers == 2
    assert [float((a - b).abs().max()) for a, b in zip(found, pruned, strict=True)] == [0, 0]
