"""A call may end in ways that no hook sees: Ctrl-C, a timeout, a cancelled task. After it nothing of us is at work.

torch runs ``always_call`` hooks for ``Exception`` only. What is looked at afterwards: no scope, another pipeline of the
same code as if there were no tokentrim, the same pipeline's next run as a fresh one, after unpatch as never patched.
With ``HYPOTHESIS_PROFILE=nightly`` every kind at every denoiser call and every depth (in an attention kernel, in a
submodule, in a hook of somebody else, in the replay, in the first chunk); else a diagonal through these.
"""

from __future__ import annotations

import os

import pytest
import tiny_reference
import torch
from interruptions import KINDS, POLICY, raising, subject, unpatch_here, unpatch_in_a_thread
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import assert_same, fingerprint

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
ROUNDS = 4
"""Places of a model at which a call is interrupted where not all are tried; each in other ways than the one before."""


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
    assert 1 < first.proof == first.replay - target.proofs
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


@pytest.mark.parametrize("probe", ("first-step", "candidate"))
def test_a_patch_that_comes_off_while_a_call_is_proved_repeatable_prunes_nothing(probe):
    """From another thread, in each call that the proof makes: nothing is pruned that nobody would keep out any more."""
    target = TARGETS[0]
    pipeline = target.make()
    plain = target.run(pipeline)
    for call in range(15, 19) if probe == "candidate" else (12,):
        seen = []
        handle = tokentrim.patch(pipeline, POLICY, probe=probe)

        def count(*_, handle=handle, seen=seen, call=call):
            seen.append(1)
            if len(seen) == call:
                unpatch_in_a_thread(handle)

        hook = target.denoiser(pipeline).register_forward_hook(count)
        assert torch.equal(target.run(pipeline), plain), call
        hook.remove()
        assert len(seen) > 5 * tiny_reference.CHUNKS and not handle.report.triggers


def test_a_proof_that_is_broken_off_writes_nothing_that_it_did_not_change():
    """Helios keeps buffers: what is put back leaves them as they were, the count of their writes too."""
    target = next(target for target in TARGETS if target.name == "helios")
    pipeline = target.make()
    target.run(pipeline)
    before, seen = fingerprint(target.denoiser(pipeline)), []
    handle = tokentrim.patch(pipeline, POLICY)

    def interrupt(*_):
        seen.append(1)
        if len(seen) == 6:
            raising(KeyboardInterrupt)()

    hook = target.denoiser(pipeline).register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        target.run(pipeline)
    hook.remove()
    assert len(handle.report.records) == 3
    handle.unpatch()
    assert_same(before, fingerprint(target.denoiser(pipeline)))
