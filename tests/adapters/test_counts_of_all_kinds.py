"""Whatever a model counts its calls in: its second call in a step is refused in words, and what had moved is put back.

Each of these counts acts late, so that a call made twice gives the same bits when that is first tried.
"""

from __future__ import annotations

import collections
import itertools
import random
from types import SimpleNamespace

import numpy
import pytest
import tiny_reference as tiny
import torch
from targets import TARGETS

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
REFUSED = "counts its calls|keeps an iterator|keeps a memory"


def numbers():
    yield from range(1, 1000)


def grown(container, add):
    """The size of a container by how many calls there have been."""

    def count():
        add(container)
        return len(container)

    return count


def moved(content, step):
    """The first number in something, one more at each call."""

    def count():
        step(content)
        return int(content[-1])

    return count


def one_more(content):
    content[-1] += 1


def drawn(dice, draw):
    """How many calls there have been, by numbers that are drawn in order."""
    made = [draw() for _ in range(200)]
    dice[1](dice[0])
    return lambda: made.index(draw()) + 1


def ways():
    """By what the count is kept in: a function that counts on and returns how many calls there have been."""
    nested, deep = {"branch": {"layer": [0]}}, SimpleNamespace(state=SimpleNamespace(inner={"n": [0]}))
    generator, ranged = numbers(), iter(range(1, 999))
    composed = zip(itertools.count(1), itertools.repeat(0), strict=False)
    cycle, mapped, dice = itertools.cycle(range(1, 50)), map(abs, range(1, 99)), random.Random(0)
    torch_dice = torch.Generator().manual_seed(0)
    return {
        "list": grown([], lambda kept: kept.append(0)),
        "dict": grown({}, lambda kept: kept.__setitem__(len(kept), None)),
        "set": grown(set(), lambda kept: kept.add(len(kept))),
        "deque": grown(collections.deque(), lambda kept: kept.append(0)),
        "bytes": grown(bytearray(), lambda kept: kept.append(0)),
        "number in a list": moved([0], one_more),
        "number in a deque": moved(collections.deque([0], maxlen=1), lambda kept: kept.append(kept[-1] + 1)),
        "numpy": moved(numpy.zeros(3), one_more),
        "tensor of a few": moved(torch.zeros(5, dtype=torch.long), one_more),
        "tensor of floats": moved(torch.zeros(1), one_more),
        "nested": moved(nested["branch"]["layer"], lambda kept: one_more(nested["branch"]["layer"])),
        "object in an object": moved(deep.state.inner["n"], lambda kept: one_more(deep.state.inner["n"])),
        "generator": lambda: next(generator),
        "range": lambda: next(ranged),
        "zip": lambda: next(composed)[0],
        "cycle": lambda: next(cycle),
        "map": lambda: next(mapped),
        "dice": drawn((dice, lambda d: d.seed(0)), lambda: dice.random()),
        "dice of torch": drawn(
            (torch_dice, lambda d: d.manual_seed(0)), lambda: float(torch.rand((), generator=torch_dice))
        ),
    }


def count_behind(pipeline, count, act=7):
    """Have every ``act``-th call answered otherwise, by a count behind a forward that was replaced."""
    denoiser = pipeline.generator
    original = denoiser.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        return output if count() % act != act - 1 else tuple(part * 1.05 for part in output)

    denoiser.forward = forward


def stepped_aside(make):
    """A video with ``on_error="warn"``, and what was said."""
    pipeline = make()
    said = pytest.warns(tokentrim.TokenTrimWarning, match=REFUSED)
    with tokentrim.patched(pipeline, POLICY, on_error="warn"), said:
        return tiny.run(pipeline)


@pytest.mark.parametrize("kind", ways())
def test_a_count_of_any_kind_is_refused(kind):
    def make():
        pipeline = tiny.make()
        count_behind(pipeline, ways()[kind])
        return pipeline

    pipeline = make()
    with tokentrim.patched(pipeline, POLICY), pytest.raises(tokentrim.UnsupportedContextError, match=REFUSED):
        tiny.run(pipeline)
    assert torch.equal(stepped_aside(make), tiny.run(make()))


ATTRIBUTES = {
    "list": (list, lambda kept: (kept.append(0), len(kept))[1]),
    "array": (lambda: numpy.zeros(2), lambda kept: (one_more(kept), int(kept[-1]))[1]),
    "generator": (numbers, next),
    "dict of dicts": (lambda: {"a": {"n": [0]}}, lambda kept: (one_more(kept["a"]["n"]), kept["a"]["n"][0])[1]),
    "memory": (lambda: torch.zeros(3), lambda kept: (one_more(kept), int(kept[-1]))[1]),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_an_attribute_of_any_kind_is_refused(kind):
    start, step = ATTRIBUTES[kind]

    def make():
        pipeline = tiny.make()
        pipeline.generator.kept = start()
        count_behind(pipeline, lambda: step(pipeline.generator.kept))
        return pipeline

    pipeline = make()
    with tokentrim.patched(pipeline, POLICY), pytest.raises(tokentrim.UnsupportedContextError, match=REFUSED):
        tiny.run(pipeline)
    assert torch.equal(stepped_aside(make), tiny.run(make()))


LATER = [0]


def count_of_this_file():
    LATER[0] += 1
    return LATER[0]


def test_a_list_that_is_a_global_is_refused():
    pipeline = tiny.make()
    count_behind(pipeline, count_of_this_file)
    with tokentrim.patched(pipeline, POLICY), pytest.raises(tokentrim.UnsupportedContextError, match="LATER"):
        tiny.run(pipeline)


@pytest.mark.parametrize("target", TARGETS[:3], ids=lambda target: target.name)
def test_what_is_only_added_to_is_a_log(target):
    plain, pipeline = target.make(), target.make()
    with tokentrim.patched(plain, POLICY):
        right = target.run(plain)
    log, latest = [], collections.deque(maxlen=4)
    denoiser = target.denoiser(pipeline)
    original = denoiser.forward

    def forward(*args, **kwargs):
        log.append(len(kwargs))
        latest.append(kwargs)
        return original(*args, **kwargs)

    denoiser.forward = forward
    with tokentrim.patched(pipeline, POLICY) as handle:
        assert torch.equal(target.run(pipeline), right)
    assert handle.report.triggers == 1 and log
