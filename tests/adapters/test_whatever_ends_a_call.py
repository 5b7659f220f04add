"""A call may end in ways that no hook sees: Ctrl-C, a timeout, a cancelled task. After it nothing of us is at work.

torch runs ``always_call`` hooks for ``Exception`` only. What is looked at afterwards: no scope, another pipeline of the
same code as if there were no tokentrim, the same pipeline's next run as a fresh one, after unpatch as never patched.
With ``HYPOTHESIS_PROFILE=nightly`` every kind at every denoiser call and every depth (in an attention kernel, in a
submodule, in a hook of somebody else, in the replay, in the first chunk); else a diagonal through these.
"""

from __future__ import annotations

import functools
import os

import pytest
from interruptions import KINDS, Subject, unpatch_here, unpatch_in_a_thread
from targets import TARGETS, each_target

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
ROUNDS = 4
"""Places of a model at which a call is interrupted where not all are tried; each in other ways than the one before."""


@functools.cache
def subject(target):
    return Subject(target)


def places(target):
    """All places, or a few from the first call to the last, the replay's among them."""
    found = subject(target).places()
    if NIGHTLY:
        return found
    step = len(found) / ROUNDS
    return [found[int((number + 0.5) * step)] for number in range(ROUNDS)]


@each_target
def test_the_places_are_in_the_calls_that_matter(target):
    """Every depth, the first chunk, the replay with nothing pruned, that of the prune, and calls behind them."""
    events, first = subject(target).first.events, subject(target).first
    assert 1 < first.proof == first.replay - 1
    # What is called of a denoiser before its first call is at number 0.
    assert {event.call for event in subject(target).places()} - {0} == set(range(1, events[-1].call + 1))
    assert len({event.depth for event in events}) >= 5


@each_target
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_call_is_interrupted(target, kind):
    turn = KINDS.index(kind)
    for number, place in enumerate(places(target)):
        if NIGHTLY or number % len(KINDS) == turn or (number + ROUNDS * TARGETS.index(target)) % len(KINDS) == turn:
            subject(target).interrupt(place, kind)


@each_target
def test_one_after_the_other(target):
    """A call is broken off in one way after the other, without a whole run in between."""
    for place in places(target) if NIGHTLY else places(target)[ROUNDS // 2 : ROUNDS // 2 + 1]:
        subject(target).interrupt(place, *KINDS)


@each_target
@pytest.mark.parametrize("unpatch", (unpatch_here, unpatch_in_a_thread), ids=lambda unpatch: unpatch.__name__)
def test_the_patch_comes_off_in_the_middle_of_a_call(target, unpatch):
    offset = unpatch is unpatch_here
    for place in places(target) if NIGHTLY else places(target)[offset::2]:
        subject(target).unpatch_amid(place, unpatch)
