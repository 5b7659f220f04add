"""Ctrl-C while a patch is put on, or comes off: unpatch makes the model what it was, to the attribute."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import tiny_reference as tiny
import torch
from test_interrupted_lines import Lines

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy, assert_same, fingerprint

POLICY = ForcedPolicy({2: (1,)})
PLACES = 25


def chosen(seen):
    """Some of the lines that ran, any line being as likely as any other, and at which of its times."""
    choice, times = random.Random(0), Counter(seen)
    return [(line, choice.randrange(times[line])) for line in choice.sample(sorted(times), PLACES)]


@pytest.fixture(scope="module")
def patchable():
    """A pipeline that has been patched, and what it was: the first patch loads what later ones do not."""
    pipeline = tiny.make()
    plain = tiny.run(pipeline)
    tokentrim.patch(pipeline, POLICY).unpatch()
    return pipeline, plain, fingerprint(pipeline.generator)


def test_ctrl_c_in_patch(patchable):
    pipeline, plain, before = patchable
    with Lines() as lines:
        handle = tokentrim.patch(pipeline, POLICY)
    handle.unpatch()
    for line, nth in chosen(lines.seen):
        with Lines(line, nth), pytest.raises(KeyboardInterrupt):
            tokentrim.patch(pipeline, POLICY)
        tokentrim.unpatch(pipeline)
        assert_same(before, fingerprint(pipeline.generator))
    assert torch.equal(tiny.run(pipeline), plain)


def test_ctrl_c_in_unpatch(patchable):
    pipeline, plain, before = patchable
    handle = tokentrim.patch(pipeline, POLICY)
    tiny.run(pipeline)
    with Lines() as lines:
        handle.unpatch()
    for line, nth in chosen(lines.seen):
        handle = tokentrim.patch(pipeline, POLICY)
        tiny.run(pipeline)
        with Lines(line, nth), pytest.raises(KeyboardInterrupt):
            handle.unpatch()
        handle.unpatch()
        assert_same(before, fingerprint(pipeline.generator))
        assert torch.equal(tiny.run(pipeline), plain)
