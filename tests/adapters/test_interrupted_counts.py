"""Whatever ends a call of a model in which somebody counts: the counts that are put back are those of no other run.

As ``test_whatever_ends_a_call.py``, with a hook that counts the calls of a video and acts by their number, so that each
prune is proved; with ``HYPOTHESIS_PROFILE=nightly`` at every call and every depth, else where calls are made again.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from interruptions import KINDS, Event, subject, unpatch_here, unpatch_in_a_thread
from targets import COUNTING, Target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import assert_same, fingerprint

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
CHEAP = ("self-forcing", "skyreels-v2", "helios")
"""A cache, windows in which chunks overlap, a history in the sequence."""
TRIED = COUNTING if NIGHTLY else tuple(target for target in COUNTING if target.name.removesuffix("-counting") in CHEAP)
each_counting = pytest.mark.parametrize("target", TRIED, ids=lambda target: target.name)


def places(target: Target) -> list[Event]:
    """All places; or one behind the hook in each call that is made again, and in the one behind these."""
    of = subject(target)
    if NIGHTLY:
        return of.places()
    calls = range(of.first.proof, of.first.replay + 2)
    return [[event for event in of.first.events if event.call == call][-4] for call in calls]


@each_counting
def test_each_prune_is_proved(target: Target) -> None:
    """The first one by two calls, of which the first shows that somebody counts; in a cache by one more."""
    assert (subject(target).first.proofs, subject(target).later.proofs) == (1 + target.proofs, 1)


@each_counting
def test_a_call_is_interrupted(target: Target) -> None:
    for number, place in enumerate(places(target)):
        for kind in KINDS if NIGHTLY else (KINDS[(number + COUNTING.index(target)) % len(KINDS)],):
            subject(target).interrupt(place, kind)


@each_counting
def test_one_after_the_other(target: Target) -> None:
    for place in places(target) if NIGHTLY else places(target)[1:2]:
        subject(target).interrupt(place, *KINDS)


@each_counting
@pytest.mark.parametrize("unpatch", (unpatch_here, unpatch_in_a_thread), ids=lambda unpatch: unpatch.__name__)
def test_the_patch_comes_off_in_the_middle_of_a_call(target: Target, unpatch: Any) -> None:
    for place in places(target) if NIGHTLY else places(target)[unpatch is unpatch_here :: 2]:
        subject(target).unpatch_amid(place, unpatch)


@each_counting
def test_the_patch_comes_off_in_the_proof_and_ctrl_c_follows(target: Target) -> None:
    """What the proof puts back is the model's: not what a patch had hung on it."""
    pipeline, proof = target.make(), subject(target).first.proof
    plain, denoiser = target.run(pipeline), target.denoiser(pipeline)
    before, made = fingerprint(denoiser), []
    handle = tokentrim.patch(pipeline, subject(target).policy)

    def off(*_: Any) -> None:
        made.append(1)
        if len(made) == proof:
            handle.unpatch()
            raise KeyboardInterrupt

    hook = denoiser.register_forward_pre_hook(off)
    with pytest.raises(KeyboardInterrupt):
        target.run(pipeline)
    hook.remove()
    assert_same(before, fingerprint(denoiser))
    assert not tokentrim.is_patched(pipeline) and torch.equal(target.run(pipeline), plain)
