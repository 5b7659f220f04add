"""Before the first prune a call is made again with nothing pruned: what keeps something between calls is refused."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_reference as tiny
import torch
from targets import TARGETS, each_target
from torch import nn
from torch.utils._pytree import tree_map

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.controls import ChooseTokens, FreshNoise
from tokentrim_hooks.pruning.call_scope import current_scope
from tokentrim_hooks.rollout.repeat.proof import is_noise
from tokentrim_hooks.testing import ForcedPolicy, count_syncs

POLICY = ForcedPolicy({2: [0, 3]})


def changed(output, how):
    """An output with ``how`` applied to every tensor that has channels."""
    return tree_map(lambda part: how(part) if torch.is_tensor(part) and part.is_floating_point() else part, output)


def watch(block, answer):
    """``answer(block, x, output)`` may return another output; ``x`` is what the block was given."""

    def hook(module, args, kwargs, output):
        return answer(module, args[0] if args else kwargs["hidden_states"], output)

    block.register_forward_hook(hook, with_kwargs=True)


def direction(part):
    """What no normalisation takes out again."""
    return torch.linspace(-1, 1, part.shape[-1], dtype=part.dtype)


def skip_steps(block, count=None):
    """MagCache's kind: every other call is answered with what an earlier one added, kept in an object."""
    block.magcache = SimpleNamespace(step=0, residual=None)

    def answer(module, entered, output):
        cache = module.magcache
        cache.step = cache.step + 1 if count is None else count()
        if cache.step % 2 and cache.residual is not None and cache.residual.shape == entered.shape:
            return changed(output, lambda part: entered + cache.residual if part.shape == entered.shape else part)
        first = output if torch.is_tensor(output) else output[0]
        if first.shape == entered.shape:
            cache.residual = first - entered
        return None

    watch(block, answer)


def retrieve(block):
    """A retrieval's kind: the first call for an input adds what it found for another one, a second call does not."""
    block.asked = block.bank = None

    def answer(module, entered, output):
        found = module.bank
        if module.asked is not None and torch.equal(module.asked, entered):
            return None
        module.asked, module.bank = entered.clone(), entered.abs().mean()
        return None if found is None else changed(output, lambda part: part + found * direction(part))

    watch(block, answer)


def remember_in_place(block):
    """A memory bank's kind: one tensor, written in place."""
    block.register_buffer("memory", torch.zeros(1), persistent=False)

    def answer(module, entered, output):
        module.memory.mul_(0.5).add_((output if torch.is_tensor(output) else output[0]).abs().mean())
        return changed(output, lambda part: part + module.memory * direction(part))

    watch(block, answer)


def drop_out(block):
    block.register_forward_hook(
        lambda module, args, output: changed(output, lambda part: nn.functional.dropout(part, 0.1, training=True))
    )


def draw_from_its_own(block):
    """Random numbers of a generator that the model keeps, and of Python's."""
    block.numbers = torch.Generator().manual_seed(0)

    def answer(module, entered, output):
        scale = 0.1 + random.random() / 10
        return changed(output, lambda part: part + scale * torch.randn(part.shape, generator=module.numbers))

    watch(block, answer)


KEEPERS = (retrieve, remember_in_place, drop_out, draw_from_its_own)
each_keeper = pytest.mark.parametrize("keeper", KEEPERS, ids=lambda keeper: keeper.__name__)


def made(target, keeper):
    pipeline = target.make()
    keeper(target.depths(pipeline)["block"])
    return pipeline


def run(target, pipeline):
    random.seed(0)
    return target.run(pipeline)


@each_keeper
@each_target
def test_what_keeps_something_is_refused_and_the_video_stays(target, keeper):
    """With "raise" the error says what was found; with "warn" the video has the bits of one that was never patched."""
    plain = run(target, made(target, keeper))
    state, drawn = torch.get_rng_state(), random.getstate()
    pipeline = made(target, keeper)
    said = pytest.warns(tokentrim.TokenTrimWarning, match="with nothing pruned|keeps a memory .*(residual|memory)")
    with tokentrim.patched(pipeline, POLICY, on_error="warn") as handle, said:
        video = run(target, pipeline)
    assert torch.equal(video, plain)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == drawn
    assert handle.report.triggers == 0


@each_target
def test_steps_that_are_skipped_by_their_number_are_skipped_again(target):
    """The same as by a number that no repeated call moves on: each is computed, or skipped, as it was."""
    videos, skipped = [], target.make()
    plain = target.make()
    for kind in ("counted", "told"):
        pipeline, number = target.make(), [0]
        told = partial(number.__getitem__, 0) if kind == "told" else None
        target.denoiser(pipeline).register_forward_pre_hook(partial(up_unless_repeated, number))
        skip_steps(target.depths(pipeline)["block"], told)
        with tokentrim.patched(pipeline, POLICY) as handle:
            videos.append(target.run(pipeline))
        assert handle.report.triggers == 1
    skip_steps(target.depths(skipped)["block"])
    assert torch.equal(*videos)
    assert not torch.equal(videos[0], target.run(skipped)), "nothing was pruned"
    assert not torch.equal(target.run(skipped), target.run(plain)), "nothing was skipped"


def up_unless_repeated(number, *_):
    """A hook: one more call of the sampler's, as our own scope of the running call says."""
    scope = current_scope()
    number[0] += scope is None or scope.replayer is None


@each_keeper
def test_the_error_says_by_how_much_and_what_to_do(keeper):
    pipeline = made(TARGETS[0], keeper)
    words = r"(output moved by [0-9.e-]+ of [0-9.]+, .* alike|keeps a memory .*)\.\nSwitch .*override Adapter.replay"
    with tokentrim.patched(pipeline, POLICY), pytest.raises(tokentrim.UnsupportedContextError, match=words):
        run(TARGETS[0], pipeline)
    assert all(torch.isfinite(layer["v"]).all() for layer in pipeline.kv_cache1)


def test_dropout_that_was_left_on_is_named():
    pipeline = tiny.make()
    block = TARGETS[0].depths(pipeline)["block"]
    block.drop = nn.Dropout(0.2)
    block.register_forward_hook(lambda module, args, output: module.drop(output))
    with tokentrim.patched(pipeline, POLICY), pytest.raises(tokentrim.UnsupportedContextError, match="dropout is on"):
        tiny.run(pipeline)


@pytest.mark.parametrize(
    "control", [ChooseTokens(POLICY, "none"), FreshNoise(POLICY)], ids=["regenerate only", "new noise"]
)
def test_controls_that_only_regenerate_need_the_proof_too(control):
    pipeline = made(TARGETS[0], retrieve)
    with tokentrim.patched(pipeline, control), pytest.raises(tokentrim.UnsupportedContextError, match="made again"):
        tiny.run(pipeline)


@each_target
def test_the_proof_is_made_once(target):
    """One call; of a cache one more, with other latents, which shows where rows are."""
    pipeline, calls = target.make(), []
    target.denoiser(pipeline).register_forward_hook(lambda *_: calls.append(1))
    with tokentrim.patched(pipeline, ForcedPolicy({1: [0], 2: [0, 3]})) as handle:
        target.run(pipeline)
        target.run(pipeline)
        records = [record for record in handle.report if record.sample == 0]
    paid = [record.proof_calls for record in records]
    assert sum(paid) == target.proofs == max(paid)
    assert paid.index(target.proofs) == [record.extra_calls > 0 for record in records].index(True)
    seen = sum(sum(record.phases.values()) + record.extra_calls + record.proof_calls for record in records)
    assert len(calls) == seen + 2 * target.beside
    assert f"{target.proofs} more to prove" in handle.report.summary()


def test_the_candidate_probe_replays_all_steps():
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, POLICY, probe="candidate") as handle:
        tiny.run(pipeline)
    pruned = handle.report.records[2]
    assert pruned.pruned and pruned.proof_calls == pruned.extra_calls + 1 > 2


def test_the_proof_costs_one_synchronisation():
    def waits(chunks):
        pipeline = tiny.make()
        with tokentrim.patched(pipeline, ForcedPolicy({chunk: [0] for chunk in chunks})), count_syncs() as log:
            tiny.run(pipeline)
        return [event for event in log.events if "repeat/proof.py" in " ".join(event.stack)]

    assert [len(waits(chunks)) for chunks in ([], [2], [2, 3])] == [0, 1, 1]


# ------------------------------------------------------------------------------------------- kernels that are not exact


def noisy(block, size):
    """Rounding that differs from call to call, of numbers that nobody keeps."""

    def answer(module, entered, output):
        numbers = torch.Generator()
        numbers.seed()
        return changed(output, lambda part: part + size * part.abs().max() * torch.randn(part.shape, generator=numbers))

    watch(block, answer)


def test_kernels_that_round_otherwise_each_time_are_no_reason_to_refuse():
    pipeline = tiny.make()
    noisy(TARGETS[0].depths(pipeline)["block"], 3e-6)
    with tokentrim.patched(pipeline, POLICY) as handle:
        tiny.run(pipeline)
    assert handle.report.records[2].pruned and handle.report.records[2].proof_calls == 3


def test_noise_that_is_no_rounding_is_refused():
    pipeline = tiny.make()
    noisy(TARGETS[0].depths(pipeline)["block"], 3e-3)
    refusal = pytest.raises(tokentrim.UnsupportedContextError, match="never alike")
    with tokentrim.patched(pipeline, POLICY), refusal:
        tiny.run(pipeline)


@pytest.mark.parametrize(
    ("measured", "dtype", "expected"),
    [
        ((3e-2, 3e-2, 4e-2), torch.bfloat16, True),  # alike: noise of bf16
        ((6e-2, 6e-2, 4e-2), torch.bfloat16, False),  # too large for it
        ((3e-2, 3e-2, 0.0), torch.bfloat16, False),  # every time alike: kept
        ((3e-2, 3e-2, 2e-3), torch.bfloat16, False),  # kept, beneath a noise that is smaller
        ((3e-2, 3e-2, 4e-2), torch.float32, False),
        ((5e-5, 0.0, 5e-5), torch.float32, True),  # one call in three differs
        ((2e-6, 2e-6, 0.0), torch.float32, True),  # another kernel for the second call, and for every later one
        ((float("nan"), 0.0, float("nan")), torch.float32, False),
    ],
)
def test_noise_is_told_from_what_a_model_keeps(measured, dtype, expected):
    assert is_noise(measured, 1.0, dtype) is expected
    assert is_noise(tuple(7 * m for m in measured), 7.0, dtype) is expected
