"""Self-Forcing's real source, interrupted or unpatched amid any of its calls: afterwards nothing of us is at work.

As ``tests/adapters/test_whatever_ends_a_call.py`` does with the bundled model and with those of diffusers: with
``HYPOTHESIS_PROFILE=nightly`` at every denoiser call and every depth, else at a few places.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness import noise_of
from interruptions import KINDS, Event, Subject, unpatch_here, unpatch_in_a_thread
from targets import Target
from test_ended_between_calls import Between, interrupt
from tiny_self_forcing import Setup, few_step_pipeline, self_forcing
from torch import Tensor

pytestmark = pytest.mark.upstream

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SETUP = Setup(window=9, sink=3)
"""A window that rolls once all of its five chunks of three frames are there."""


def run(pipeline: Any) -> Tensor:
    """One video ``[1, 15, 16, 16, 20]``, of a known random stream."""
    torch.manual_seed(0)
    video: Tensor = pipeline.inference(noise_of(1, 15), ["a cat"], return_latents=True)[1]
    return video.clone()


@contextmanager
def real_source() -> Iterator[Target]:
    """The target, while its checkout is open."""
    with self_forcing() as repository:
        yield Target("self-forcing-source", lambda: few_step_pipeline(repository, SETUP), run, "generator", proofs=2)


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with real_source() as target:
        yield Subject(target)


def places(subject: Subject) -> list[Event]:
    """All places; a few from the first call to the last in an ordinary run."""
    found = subject.places()
    return found if NIGHTLY else found[len(found) // 12 :: len(found) // 6]


def test_every_depth_and_the_calls_that_matter_are_among_the_places(subject: Subject) -> None:
    """Also the replay with nothing pruned, and that of the prune."""
    assert 1 < subject.first.proof == subject.first.replay - subject.target.proofs
    assert {event.call for event in subject.places()} - {0} == set(range(1, subject.first.events[-1].call + 1))
    assert len({event.depth for event in subject.first.events}) >= 6


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_call_is_interrupted(subject: Subject, kind: type[BaseException]) -> None:
    found = places(subject)
    for place in found if NIGHTLY else found[KINDS.index(kind) :: len(KINDS)]:
        subject.interrupt(place, kind)


def test_one_after_the_other(subject: Subject) -> None:
    for place in places(subject) if NIGHTLY else places(subject)[3:4]:
        subject.interrupt(place, *KINDS)


@pytest.mark.parametrize("unpatch", (unpatch_here, unpatch_in_a_thread), ids=lambda unpatch: unpatch.__name__)
def test_the_patch_comes_off_in_the_middle_of_a_call(subject: Subject, unpatch: Any) -> None:
    for place in places(subject) if NIGHTLY else places(subject)[unpatch is unpatch_here :: 2]:
        subject.unpatch_amid(place, unpatch)


def test_a_run_is_ended_between_two_calls(subject: Subject) -> None:
    with Between(subject.denoiser) as calls:
        subject.run(subject.pipeline)
    for at in range(1, calls.calls) if NIGHTLY else (1, 2, 3, calls.calls // 2):
        interrupt(subject, at, (KeyboardInterrupt, ValueError)[at % 2])
