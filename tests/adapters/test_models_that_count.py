"""A model that counts its calls would take a repeated one for the next: its count is put back before."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})


def count(target, pipeline):
    """Give the model's last block a counter, as scripts that skip steps do."""
    block = target.depths(pipeline)["block"]
    block.cnt = 0
    block.register_forward_hook(lambda module, *_: setattr(module, "cnt", module.cnt + 1))
    return block


calls = 0
all_calls = itertools.count()


class Slotted:
    __slots__ = ("n",)


class Counts:
    n = 0


def next_global():
    global calls
    calls += 1
    return calls


def next_of_all():
    return next(all_calls)


def ways_to_count():
    """By where the count is kept: a function that returns how many calls there have been."""
    keeper, counts, number, numbers = SimpleNamespace(n=0), {"n": 0}, 0, itertools.count(1)
    tensor, slotted, kind = torch.zeros(1, dtype=torch.long), Slotted(), type("Kind", (Counts,), {})
    slotted.n = 0

    def attribute(thing):
        thing.n += 1
        return thing.n

    def item():
        counts["n"] += 1
        return counts["n"]

    def variable():
        nonlocal number
        number += 1
        return number

    def default(counts={"n": 0}):  # noqa: B006 - the pitfall is what is tested
        counts["n"] += 1
        return counts["n"]

    def of_itself():
        return attribute(of_itself)

    of_itself.n = 0
    return {
        "object": lambda: attribute(keeper),
        "object with slots": lambda: attribute(slotted),
        "class": lambda: attribute(kind),
        "dict": item,
        "variable": variable,
        "default": default,
        "function": of_itself,
        "iterator": lambda: next(numbers),
        "tensor": lambda: int(tensor.add_(1)),
        "partial": functools.partial(attribute, keeper),
        "global": next_global,
        "global iterator": next_of_all,
    }


def count_behind(target, pipeline, kind):
    """The same behind a forward that was replaced; returns what gives the next number."""
    denoiser, count = target.denoiser(pipeline), ways_to_count()[kind]
    original = denoiser.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        count()
        return original(*args, **kwargs)

    denoiser.forward = forward
    return count


def right_video(target):
    """Of a model that does not count."""
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        video = target.run(pipeline)
    assert handle.report.triggers == 1
    return video


def calls_of(target):
    """How often a sampler calls its denoiser."""
    pipeline, made = target.make(), []
    target.denoiser(pipeline).register_forward_pre_hook(lambda *_: made.append(1))
    target.run(pipeline)
    return len(made)


@pytest.mark.parametrize("kind", ways_to_count())
@pytest.mark.parametrize("target", TARGETS[:2], ids=lambda target: target.name)
def test_a_count_behind_a_replaced_forward(target, kind):
    """It shows the sampler's calls, and none of those that were made once more."""
    pipeline = target.make()
    count = count_behind(target, pipeline, kind)
    first = count()
    with tokentrim.patched(pipeline, POLICY) as handle:
        assert torch.equal(target.run(pipeline), right_video(target))
    assert count() == first + calls_of(target) + 1
    assert handle.report.triggers == 1


@pytest.mark.parametrize("kind", ("object", "variable"))
@each_target
def test_a_count_behind_a_replaced_forward_of_each_model(target, kind):
    pipeline = target.make()
    count = count_behind(target, pipeline, kind)
    with tokentrim.patched(pipeline, POLICY):
        assert torch.equal(target.run(pipeline), right_video(target))
    assert count() == calls_of(target) + 1


@pytest.mark.parametrize("target", TARGETS[:2], ids=lambda target: target.name)
def test_a_log_of_calls_is_no_count(target):
    pipeline, log = target.make(), []
    denoiser = target.denoiser(pipeline)
    original = denoiser.forward
    denoiser.forward = lambda *args, **kwargs: log.append(len(kwargs)) or original(*args, **kwargs)
    with tokentrim.patched(pipeline, POLICY) as handle:
        target.run(pipeline)
    assert handle.report.triggers == 1 and log


@each_target
def test_a_count_of_a_hook_is_put_back(target):
    plain, pipeline = target.make(), target.make()
    right, block = count(target, plain), count(target, pipeline)
    target.run(plain)
    with tokentrim.patched(pipeline, POLICY):
        assert torch.equal(target.run(pipeline), right_video(target))
    assert block.cnt == right.cnt > 0


@each_target
def test_each_prune_of_a_model_that_counts_is_proved(target):
    """The first one twice: with the counts where they are, which shows them, and with the counts put back.

    Where rows are, in a cache, is shown once.
    """
    pipeline = target.make()
    count(target, pipeline)
    with tokentrim.patched(pipeline, ForcedPolicy({1: [0], 2: [0, 3]})) as handle:
        target.run(pipeline)
    assert [record.proof_calls for record in handle.report if record.regenerations] == [1 + target.proofs, 1]


@each_target
def test_a_count_that_begins_late_is_refused(target):
    """No call of those from which is learned has moved it."""
    pipeline = target.make()
    block = target.depths(pipeline)["block"]
    block.cnt, made = 0, []

    def hook(module, *_):
        made.append(1)
        if len(made) > 4:
            module.cnt = module.cnt + 1

    block.register_forward_hook(hook)
    refusal = pytest.raises(tokentrim.UnsupportedContextError, match="counts its calls")
    with tokentrim.patched(pipeline, POLICY), refusal:
        target.run(pipeline)


@each_target
def test_costs_nothing_but_the_pruning_with_warn(target):
    plain, pipeline = target.make(), target.make()

    def late(pipeline):
        block = count(target, pipeline)
        block.late, block.of = 0, []
        block.register_forward_hook(
            lambda module, *_: module.of.append(1) or setattr(module, "late", max(0, len(module.of) - 4))
        )
        return block

    right, wanted = late(plain), target.run(plain)
    block = late(pipeline)
    with tokentrim.patched(pipeline, POLICY, on_error="warn"), pytest.warns(tokentrim.TokenTrimWarning, match="counts"):
        video = target.run(pipeline)
    assert torch.equal(video, wanted) and block.cnt == right.cnt


@each_target
def test_a_count_does_not_matter_while_nothing_is_pruned(target):
    pipeline = target.make()
    count(target, pipeline)
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle:
        target.run(pipeline)
    assert any(record.severity is not None for record in handle.report)


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[5]], ids=lambda target: target.name)
def test_a_call_that_is_answered_from_an_earlier_one_is_told_as_such(target):
    """TeaCache's kind: by how far the input has moved since, which a repeated call's has not."""
    pipeline, kept = target.make(), SimpleNamespace(input=None, output=None)
    denoiser = target.denoiser(pipeline)
    inner = getattr(denoiser, "model", denoiser)  # the reference model makes x0 of flow around it
    original = inner.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        given = args[0] if args else kwargs["hidden_states"]
        if kept.input is None or kept.input.shape != given.shape or not kept.input.equal(given):
            kept.input, kept.output = given.clone(), original(*args, **kwargs)
        return kept.output

    inner.forward = forward
    right = target.run(target.make())
    with pytest.warns(tokentrim.TokenTrimWarning) as told, tokentrim.patched(pipeline, POLICY) as handle:
        video = target.run(pipeline)
    assert video.equal(right) and handle.report.triggers == 0
    assert len(told) == 1 and "TeaCache" in str(told[0].message)
