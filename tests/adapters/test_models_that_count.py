"""A model that counts its calls takes a repeated one for the next: refused in words, and its count put back."""

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


@pytest.mark.parametrize("kind", ways_to_count())
@pytest.mark.parametrize("target", TARGETS[:2], ids=lambda target: target.name)
def test_a_count_behind_a_replaced_forward(target, kind):
    """Refused, and put back: how far it has come does not show the call that was made to prove something."""
    pipeline = target.make()
    count, made = count_behind(target, pipeline, kind), []
    target.denoiser(pipeline).register_forward_pre_hook(lambda *_: made.append(1))
    first = count()
    refusal = pytest.raises(tokentrim.UnsupportedContextError, match="counts its calls")
    with tokentrim.patched(pipeline, POLICY), refusal:
        target.run(pipeline)
    assert count() == first + len(made), "one of the calls was the proof"


@pytest.mark.parametrize("kind", ("object", "variable"))
@each_target
def test_a_count_behind_a_replaced_forward_of_each_model(target, kind):
    pipeline = target.make()
    count_behind(target, pipeline, kind)
    refusal = pytest.raises(tokentrim.UnsupportedContextError, match="counts its calls")
    with tokentrim.patched(pipeline, POLICY), refusal:
        target.run(pipeline)


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
def test_is_refused_at_the_first_prune(target):
    pipeline = target.make()
    block = count(target, pipeline)
    refusal = pytest.raises(tokentrim.UnsupportedContextError, match="counts its calls")
    with tokentrim.patched(pipeline, POLICY), refusal:
        target.run(pipeline)
    assert block.cnt > 0


@each_target
def test_costs_nothing_but_the_pruning_with_warn(target):
    plain, pipeline = target.make(), target.make()
    right, wanted = count(target, plain), target.run(plain)
    block = count(target, pipeline)
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
