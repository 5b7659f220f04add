"""A batch replays only its flagged samples: that gives what a replay of the whole batch gives, and costs less."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import framepack_tiny
import helios_tiny
import pytest
import skyreels_tiny
import tiny_reference
import torch
from forced import ForcedPolicy
from interruptions import Timeout, nothing_is_open
from targets import TARGETS
from tokentrim_hooks_adapters.self_forcing import SelfForcing
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.controls import FreshNoise
from tokentrim_hooks.pruning.samples import Samples, runs_of
from tokentrim_hooks.rollout.repeat.cut import CutCall, NotSeparableError
from tokentrim_hooks.rollout.replays import Replayer

BATCH, DEAD, AT = 4, [0, 3], (2, 3)
TARGET = {target.name: target for target in TARGETS}
RUNS = {
    "self-forcing": tiny_reference.run,
    "skyreels-v2": lambda pipe, **of: skyreels_tiny.run(
        pipe, num_frames=45, base_num_frames=17, overlap_history=9, **of
    ),
    "framepack": framepack_tiny.run,
    "helios": helios_tiny.run,
}
FLAGS = ((False, False, True, False), (False, True, True, False), (True, False, True, False))
ALONE = {FLAGS[0]: [1], FLAGS[1]: [2], FLAGS[2]: [1, 1]}
"""Batches of the calls that a replay takes, by what is flagged."""


def policy_of(flags, at=AT, **options):
    return ForcedPolicy(plan={chunk: [DEAD if flag else [] for flag in flags] for chunk in at}, **options)


def watched(pipeline, name):
    """The batch of every denoiser call that is made from now on."""
    sizes = []

    def note(_module, args, kwargs):
        sizes.append(next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x)).shape[0])

    TARGET[name].denoiser(pipeline).register_forward_pre_hook(note, with_kwargs=True)
    return sizes


def whole_batches(monkeypatch):
    monkeypatch.setattr(Replayer, "_separated", lambda *_: ([], (0, ())))


def rolled_out(name, policies, pipeline=None, spoil=None, **options):
    """A video, and the batches of its denoiser calls; ``spoil`` changes a block of the patched model."""
    pipeline = pipeline or TARGET[name].make()
    sizes = watched(pipeline, name)
    with tokentrim.patched(pipeline, policies, **options) as handle:
        if spoil is not None:
            spoil(TARGET[name].depths(pipeline)["block"])
        video = RUNS[name](pipeline, batch=BATCH)
    return video, sizes, handle.report


def assert_alike(video, other):
    assert float((video - other).abs().max()) <= 1e-6 * max(float(other.abs().max()), 1), "not as the whole batch"


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "".join("01"[flag] for flag in flags))
@pytest.mark.parametrize("name", [name for name in RUNS if name != "framepack"])
def test_samples_alone_are_what_they_are_in_the_whole_batch(name, flags, monkeypatch):
    """At first both are made, and the whole batch counts; then only what is flagged is called again."""
    video, sizes, report = rolled_out(name, policy_of(flags))
    whole_batches(monkeypatch)
    expected, others, _ = rolled_out(name, policy_of(flags))
    assert report.triggers == 2 * sum(flags)
    assert [size for size in sizes if size < BATCH] == 2 * ALONE[flags]
    assert sizes.count(BATCH) == len(others) - 1, "the second replay was of the whole batch, too"
    assert_alike(video, expected)


def test_texts_of_other_lengths_are_left_to_the_whole_batch(caplog, monkeypatch):
    """FramePack cuts texts to the longest of the batch: alone, a sample may have fewer keys than the layout says."""
    caplog.set_level(logging.INFO)
    plan = {1: [DEAD, [], [], []], 2: [[], [], DEAD, []], 3: [DEAD, [], [], []]}
    for options in ({}, {"on_error": "warn"}):
        video, _, report = rolled_out("framepack", ForcedPolicy(plan), **options)
        assert report.triggers == 3
    whole_batches(monkeypatch)
    expected, _, _ = rolled_out("framepack", ForcedPolicy(plan))
    assert_alike(video, expected)
    assert "whole batch, flagged or not: self attention sees" in caplog.text


@pytest.mark.parametrize(
    "policies",
    (
        (policy_of(FLAGS[2], persist=False),),
        (FreshNoise(policy_of(FLAGS[2])),),
        (policy_of(FLAGS[2]), tokentrim.CommitWindow(2)),
        (policy_of(FLAGS[2]), tokentrim.FrameEviction(keep=1)),
        (policy_of(FLAGS[2]), tokentrim.LatentMoments(), tokentrim.RowMoments()),
    ),
    ids=("comes back", "fresh noise", "commit window", "hides", "corrects and settles"),
)
@pytest.mark.parametrize("probe", ("first-step", "candidate"))
def test_with_other_policies_and_probes(policies, probe, monkeypatch):
    made = [rolled_out("self-forcing", list(policies), probe=probe)]
    whole_batches(monkeypatch)
    made.append(rolled_out("self-forcing", list(policies), probe=probe))
    (video, sizes, _), (expected, others, _) = made
    assert 1 in sizes and 1 not in others
    assert_alike(video, expected)


def test_weighed_keys_are_left_to_the_whole_batch(caplog, monkeypatch):
    """What is read with less weight is found by rows of the whole batch."""
    caplog.set_level(logging.INFO)
    policies = [policy_of(FLAGS[0]), tokentrim.SoftPrune()]
    video, sizes, _ = rolled_out("self-forcing", policies, on_error="warn")
    whole_batches(monkeypatch)
    expected, _, _ = rolled_out("self-forcing", policies)
    assert torch.equal(video, expected) and set(sizes) == {BATCH}
    assert "whole batch, flagged or not: a policy weighs keys" in caplog.text


@dataclass(frozen=True)
class ThenNothing(ForcedPolicy):
    """Behind chunk 2 it asks for another attempt, of other noise, and prunes nothing."""

    def judge(self, chunk, history):
        verdict = super().judge(chunk, history)
        return verdict if chunk.index == 2 else dataclasses.replace(verdict, tokens=verdict.tokens[:, :0])


def test_keys_that_the_other_samples_have_seen_are_not_forgotten(monkeypatch):
    """While something is dead keys are accounted for: those of samples that sit out a replay are known behind it."""
    policy = FreshNoise(ThenNothing({2: [DEAD] * BATCH, 3: [[], DEAD, [], []], 4: [[], [], DEAD, []]}))

    def make():
        return tiny_reference.make(local_attn_size=12)

    video, sizes, report = rolled_out("self-forcing", policy, pipeline=make())
    assert sizes.count(1) == 2 and sum(record.regenerations for record in report) == BATCH + 2
    whole_batches(monkeypatch)
    assert_alike(video, rolled_out("self-forcing", policy, pipeline=make())[0])


# -------------------------------------------------------------------------------------------- what it costs


class Flops:
    """Matrix products of every call of a module, as ``(batch, floating-point operations)``."""

    def __init__(self, module):
        self.calls = []
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        module.register_forward_hook(self._leave, with_kwargs=True)

    def _enter(self, _module, _args, kwargs):
        self._batch, self._counter = kwargs["noisy_image_or_video"].shape[0], FlopCounterMode(display=False)
        self._counter.__enter__()

    def _leave(self, *_):
        self._counter.__exit__(None, None, None)
        self.calls.append((self._batch, self._counter.get_total_flops()))


def test_a_replay_of_one_of_eight_costs_an_eighth():
    pipeline = tiny_reference.make()
    flops = Flops(pipeline.generator)
    flags = [sample == 5 for sample in range(8)]
    with tokentrim.patched(pipeline, policy_of(flags)) as handle:
        tiny_reference.run(pipeline, batch=8)
    assert handle.report.triggers == 2
    costs = {batch: [count for size, count in flops.calls if size == batch] for batch in (1, 8)}
    assert len(costs[1]) == 2, "proved once, made use of once"
    # Called twice more with all samples to show that a call can be repeated, and where rows are; and once more for the
    # proof of parts.
    assert len(costs[8]) == 5 * tiny_reference.CHUNKS + 3
    assert 0 < max(costs[1]) <= max(costs[8]) / 8


# -------------------------------------------------------------------------------------------- what cannot be cut


def mix(block):
    """Samples see one another."""
    block.register_forward_hook(lambda _m, _a, output: output + 0.1 * output.mean(0, keepdim=True))


def keep_of_batch(block):
    """The model keeps what it has made, and blends it in again."""
    block.memory = None

    def answer(module, _args, output):
        module.memory = output.detach()
        return output

    block.register_forward_hook(answer)


def compile_block(block):
    block.compile(backend="eager")


CANNOT = {
    mix: "samples made alone differ by",
    keep_of_batch: "memory is a tensor of the batch that the model itself keeps",
    compile_block: "is compiled",
}


@pytest.mark.parametrize("spoil", CANNOT, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_cut_is_made_whole_and_said_once(spoil, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    made = []
    for turn in range(2):
        if turn:
            whole_batches(monkeypatch)
        made.append(rolled_out("self-forcing", policy_of(FLAGS[2], at=(2, 3, 4)), spoil=spoil))
    assert torch.equal(made[0][0], made[1][0]), "not as the whole batch"
    assert made[0][1].count(1) in (0, 2), "tried again"
    assert [CANNOT[spoil] in record.getMessage() for record in caplog.records].count(True) == 1


def test_an_adapter_that_replays_in_its_own_way_is_given_the_whole_batch(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(SelfForcing, "replay", lambda _self, denoiser, args, kwargs: denoiser(*args, **kwargs))
    _, sizes, _ = rolled_out("self-forcing", policy_of(FLAGS[0]))
    assert set(sizes) == {BATCH} and "replays a call in its own way" in caplog.text


# -------------------------------------------------------------------------------------------- interruptions


class Stopped(Exception):
    """Somebody's own, raised in a hook."""


@pytest.mark.parametrize("kind", (KeyboardInterrupt, Timeout, Stopped))
@pytest.mark.parametrize("nth", (1, 2), ids=("in the proof", "once it is proved"))
def test_an_interruption_leaves_the_rows_of_others_alone(nth, kind):
    """Whatever ends a part: nothing of the other samples has changed; the next video is that of a fresh patch."""
    expected, _, _ = rolled_out("self-forcing", policy_of(FLAGS[0]))
    pipeline = tiny_reference.make()
    seen, before = [], []

    def enter(_module, args):
        if args[0].shape[0] == 1:
            seen.append(1)
            if len(seen) == nth:
                raise kind

    def leave(_module, _args, kwargs, _output):
        before[:] = [tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, layer) for layer in kwargs["kv_cache"]]

    pipeline.generator.register_forward_hook(leave, with_kwargs=True)
    hook = pipeline.generator.model.blocks[-1].register_forward_pre_hook(enter)
    with tokentrim.patched(pipeline, policy_of(FLAGS[0])) as handle:
        with pytest.raises(kind):
            tiny_reference.run(pipeline, batch=BATCH)
        nothing_is_open()
        spared = [not flag for flag in FLAGS[0]]
        for layer, old in zip(pipeline.kv_cache1, before, strict=True):
            assert layer.keys() == old.keys() and all(layer[n].shape == old[n].shape for n in old)
            assert all(torch.equal(layer[name][spared], old[name][spared]) for name in ("k", "v"))
            assert all(torch.equal(layer[name], old[name]) for name in ("global_end_index", "local_end_index"))
        hook.remove()
        assert_alike(tiny_reference.run(pipeline, batch=BATCH), expected)
        assert handle.active
    fresh = tiny_reference.run(tiny_reference.make(), batch=BATCH)
    assert torch.equal(tiny_reference.run(pipeline, batch=BATCH), fresh)


# -------------------------------------------------------------------------------------------- the cut itself


def test_runs_of_neighbours():
    runs = runs_of([True, False, True, True, False, True])
    assert [(run.first, run.stop, run.before) for run in runs] == [(0, 1, 0), (2, 4, 1), (5, 6, 2)]


def test_a_cut_call_writes_into_its_own_rows_and_its_containers_are_carried_over():
    rows, counter = torch.zeros(3, 5), torch.tensor([7])
    cache = [{"v": rows, "end": counter, "init": False}, {"v": rows.clone(), "end": counter, "init": False}]
    cut = CutCall(Samples(1, 2, 3), (torch.arange(3.0)[:, None], ["a", "b", "c"]), {"cache": cache, "start": 4})
    given = cut.kwargs["cache"]
    assert cut.args[0].tolist() == [[1.0]] and cut.args[1] == ["b"] and cut.kwargs["start"] == 4
    given[0]["v"][:, 2] = 1
    given[1]["v"] = torch.full((1, 5), 2.0)
    given[0]["init"] = True
    assert cache[0]["init"] is False and not bool(cache[1]["v"].any()), "carried over before the call came back"
    cut.carry_over()
    assert cache[0]["v"].tolist() == [[0] * 5, [0, 0, 1, 0, 0], [0] * 5] and cache[0]["init"] is True
    assert cache[1]["v"].tolist() == [[0] * 5, [2] * 5, [0] * 5] and cache[0]["end"] is counter


def test_what_cannot_be_carried_over_changes_nothing():
    cache = {"v": torch.zeros(3, 5), "count": 0}
    cut = CutCall(Samples(0, 1, 3), (cache,), {})
    cut.args[0].update(v=torch.zeros(1, 6), count=1)
    with pytest.raises(NotSeparableError, match="another shape"):
        cut.carry_over()
    assert cache["v"].shape == (3, 5) and cache["count"] == 0


def test_branches_that_share_a_batch_are_cut_alike():
    """``[a, b, c, a, b, c]``: of the sample b both; an output of both branches is put back into both."""
    both, one = torch.arange(6.0), torch.arange(3.0)
    cut = CutCall(Samples(1, 2, 3, branches=2), (both, one), {})
    assert cut.args[0].tolist() == [1, 4] and cut.args[1].tolist() == [1]
    assert cut.among({"x": torch.tensor([8.0, 9.0])}, {"x": both})["x"].tolist() == [0, 8, 2, 3, 9, 5]
    cut.args[0].add_(1)
    with pytest.raises(NotSeparableError, match="branches of guidance"):
        cut.carry_over()


def test_an_argument_that_is_handed_back_stays_the_samplers_own():
    cache = torch.zeros(3, 5)
    cut = CutCall(Samples(1, 2, 3), (cache,), {})
    output = cut.among((torch.ones(1, 2), cut.args[0]), (torch.zeros(3, 2), cache))
    assert output[1] is cache and output[0].tolist() == [[0, 0], [1, 1], [0, 0]]


class Cache:
    def __init__(self):
        self.layers = [torch.zeros(3, 5)]


def test_objects_with_tensors_of_the_batch_are_not_cut():
    with pytest.raises(NotSeparableError, match="a Cache that holds tensors of the batch"):
        CutCall(Samples(1, 2, 3), (), {"past": Cache()})
