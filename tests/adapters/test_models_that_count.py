"""A model that counts its calls takes a repeated one for the next: refused in words, and its count put back."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from targets import each_target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})


def count(target, pipeline):
    """Give the model's last block a counter, as scripts that skip steps do."""
    block = target.depths(pipeline)["block"]
    block.cnt = 0
    block.register_forward_hook(lambda module, *_: setattr(module, "cnt", module.cnt + 1))
    return block


def count_behind(target, pipeline, kind):
    """The same behind a forward that was replaced: in an object, in a dict, or in a variable of the function around."""
    denoiser = target.denoiser(pipeline)
    original, keeper, counts, number = denoiser.forward, SimpleNamespace(n=0), {"n": 0}, 0

    @functools.wraps(original)
    def forward(*args, **kwargs):
        nonlocal number
        if kind == "object":
            keeper.n += 1
        elif kind == "dict":
            counts["n"] += 1
        else:
            number += 1
        return original(*args, **kwargs)

    denoiser.forward = forward


@pytest.mark.parametrize("kind", ("object", "dict", "variable"))
@each_target
def test_a_count_behind_a_replaced_forward(target, kind):
    pipeline = target.make()
    count_behind(target, pipeline, kind)
    refusal = pytest.raises(tokentrim.UnsupportedContextError, match="counts its calls")
    with tokentrim.patched(pipeline, POLICY), refusal:
        target.run(pipeline)


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
