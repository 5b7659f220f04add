"""Whatever a model counts its calls in: put back before a call is made again, or refused in words where it cannot be.

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
from counts_put_back import TWICE, Looked, same_as_looked_up
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


LASTING = ("generator", "zip", "cycle", "map")
"""Iterators that nobody can wind back."""


def count_behind(denoiser, count, act=7):
    """Have every ``act``-th call answered otherwise, by a count behind a forward that was replaced."""
    original = denoiser.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        return output if count() % act != act - 1 else tuple(part * 1.05 for part in output)

    denoiser.forward = forward


def acting(act):
    """:func:`count_behind` with another number."""
    return lambda denoiser, count: count_behind(denoiser, count, act)


def stepped_aside(make):
    """A video with ``on_error="warn"``, and what was said."""
    pipeline = make()
    said = pytest.warns(tokentrim.TokenTrimWarning, match=REFUSED)
    with tokentrim.patched(pipeline, POLICY, on_error="warn"), said:
        return tiny.run(pipeline)


def refused(make):
    """In words, and with ``on_error="warn"`` the video is that of a model without a patch."""
    pipeline = make()
    with tokentrim.patched(pipeline, POLICY), pytest.raises(tokentrim.UnsupportedContextError, match=REFUSED):
        tiny.run(pipeline)
    assert torch.equal(stepped_aside(make), tiny.run(make()))


@pytest.mark.parametrize("act", (7, 12))
@pytest.mark.parametrize("kind", [kind for kind in ways() if kind not in LASTING])
def test_a_count_of_any_kind_is_put_back(kind, act):
    """The second is the number of the call that is made again."""
    count = ways()[kind]
    same_as_looked_up(acting(act), count)
    assert count() == 1 + 5 * tiny.CHUNKS


@pytest.mark.parametrize("kind", LASTING)
def test_what_cannot_be_wound_back_is_refused(kind):
    def make():
        pipeline = tiny.make()
        count_behind(pipeline.generator, ways()[kind])
        return pipeline

    refused(make)


@pytest.mark.parametrize("probe", ("first-step", "candidate"))
@pytest.mark.parametrize("act", (2, 3, 13))
def test_all_calls_of_a_chunk_that_is_made_again_see_what_they_saw(probe, act):
    same_as_looked_up(acting(act), ways()["number in a list"], probe=probe)


ATTRIBUTES = {
    "list": (list, lambda kept: (kept.append(0), len(kept))[1]),
    "array": (lambda: numpy.zeros(2), lambda kept: (one_more(kept), int(kept[-1]))[1]),
    "dict of dicts": (lambda: {"a": {"n": [0]}}, lambda kept: (one_more(kept["a"]["n"]), kept["a"]["n"][0])[1]),
    "memory": (lambda: torch.zeros(3), lambda kept: (one_more(kept), int(kept[-1]))[1]),
    "generator": (numbers, next),
}
REFUSED_ATTRIBUTES = ("memory", "generator")
"""Several floats are a memory, whatever is kept in them."""


@pytest.mark.parametrize("kind", [kind for kind in ATTRIBUTES if kind not in REFUSED_ATTRIBUTES])
def test_an_attribute_of_any_kind_is_put_back(kind):
    start, step = ATTRIBUTES[kind]

    def counting(denoiser, count):
        denoiser.kept = start()
        count_behind(denoiser, count or (lambda: step(denoiser.kept)))

    same_as_looked_up(counting, None)


@pytest.mark.parametrize("kind", REFUSED_ATTRIBUTES)
def test_an_attribute_that_is_no_count_is_refused(kind):
    def make():
        start, step = ATTRIBUTES[kind]
        pipeline = tiny.make()
        pipeline.generator.kept = start()
        count_behind(pipeline.generator, lambda: step(pipeline.generator.kept))
        return pipeline

    refused(make)


LATER = [0]


def count_of_this_file():
    LATER[0] += 1
    return LATER[0]


def test_a_list_that_is_a_global_is_put_back():
    LATER[0] = 0
    same_as_looked_up(acting(7), count_of_this_file)


# ------------------------------------------------------------------------------------------ beside a count


def mixing(late):
    """By a count that is put back, every ``late``-th call takes in what the call before has left in a large tensor."""

    def behind(denoiser, count):
        denoiser.latest = None

        def hook(module, args, output):
            mixed = count() % late == 0
            flow, x0 = output
            x0 = x0 + 0.05 * module.latest if mixed else x0
            module.latest = x0.detach().clone()
            return flow, x0

        denoiser.register_forward_hook(hook)

    return behind


@pytest.mark.parametrize("late", (11, 16))
def test_a_memory_that_only_some_calls_read_is_refused_when_one_of_them_is_made_again(late):
    """The 11th is made again first, and then the 16th: the first proof has not seen what this reads."""
    pipeline = tiny.make()
    mixing(late)(pipeline.generator, ways()["number in a list"])
    words = "with nothing pruned|keeps a memory"
    with tokentrim.patched(pipeline, TWICE), pytest.raises(tokentrim.UnsupportedContextError, match=words):
        tiny.run(pipeline)


def test_a_memory_that_is_read_by_no_call_that_is_made_again_may_stay():
    same_as_looked_up(mixing(13), ways()["number in a list"])


def test_what_is_counted_of_the_data_is_a_memory():
    """A sum over calls of what they have made is no number of calls: that of rows which died is in it."""
    pipeline, total = tiny.make(), [0.0]

    def hook(module, args, output):
        total[0] += float(output[1].abs().mean())
        return tuple(part * 1.05 for part in output) if total[0] > 1e9 else output

    pipeline.generator.register_forward_hook(hook)
    with tokentrim.patched(pipeline, POLICY), pytest.raises(tokentrim.UnsupportedContextError, match="keeps a memory"):
        tiny.run(pipeline)


def test_hooks_of_each_video_are_known_anew():
    """A script that registers its hooks for each video, with counts of their own."""
    looked, counting = tiny.make(), tiny.make()
    videos = []
    for pipeline in (looked, counting):
        with tokentrim.patched(pipeline, TWICE) as handle:
            for seed in range(3):
                numbers = [0]

                def count(kept=numbers):
                    kept[0] += 1
                    return kept[0]

                number = Looked(pipeline.generator) if pipeline is looked else count
                hook = pipeline.generator.register_forward_hook(
                    lambda module, args, output, number=number: output if number() % 11 else changed(output)
                )
                videos.append(tiny.run(pipeline, seed))
                hook.remove()
        assert handle.report.triggers == 6
    for right, video in zip(videos[:3], videos[3:], strict=True):
        assert torch.equal(video, right)


def changed(output):
    return tuple(part * 1.05 for part in output)


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
