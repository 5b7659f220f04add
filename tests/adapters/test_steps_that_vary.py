"""A sampler whose chunks take different numbers of denoising calls: judged at the last one, or it is said that not.

Its commits are told by the tensor that they hand back (``same``), or by nothing but their timestep.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from test_unknown_forks import DEAD, TOKENS, Fork, cache_of, home
from tokentrim_hooks_adapters.self_forcing import SelfForcing
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy, TokenTrimWarning
from tokentrim_hooks.adapter import Call
from tokentrim_hooks.testing import ForcedPolicy, count_syncs

assert home  # the fixture that gives the fork's attention a namespace

LEVELS = (1000.0, 750.0, 500.0, 250.0)
WAYS = ((4, 2, 4, 2), (2, 4, 2, 4), (4, 3, 2, 4), (2, 3, 4, 2))
each_way = pytest.mark.parametrize("steps", WAYS, ids=str)
each_commit = pytest.mark.parametrize("same", (True, False), ids=("handed back", "told by timestep"))


def fork() -> Fork:
    generator = Fork()
    times = torch.arange(1000.0, 0.0, -1.0)
    generator.scheduler = types.SimpleNamespace(timesteps=times, sigmas=times / 1000)  # type: ignore[assignment]
    return generator


def times_of(count: int) -> tuple[float, ...]:
    """The noisiest ones, and the last one."""
    return (*LEVELS[: count - 1], LEVELS[-1])


def rollout(generator: Fork, steps: tuple[int, ...], same: bool, noise: int = 1) -> Tensor:
    """A chunk of two frames for each number of steps."""
    torch.manual_seed(noise)
    cache, chunks = cache_of(), []
    for chunk, count in enumerate(steps):
        start, x0, noisy = 2 * chunk * TOKENS, torch.zeros(()), torch.randn(1, 2, 4, 4, 4)
        for time in times_of(count):
            latents = noisy if time == LEVELS[0] else (1 - time / 1000) * x0 + time / 1000 * noisy
            _, x0 = generator(latents, {}, torch.full((1, 2), time), cache, None, start)
        generator(x0 if same else x0.clone(), {}, torch.zeros(1, 2), cache, None, start)
        chunks.append(x0)
    return torch.cat(chunks, dim=1)


def said(steps: tuple[int, ...]) -> type[SelfForcing]:
    """An adapter that knows the numbers."""

    class Knows(SelfForcing):
        def steps(self, call: Call) -> int | None:
            return steps[call.start // 2]

    return Knows


@each_way
@each_commit
def test_every_chunk_is_found_and_judged_at_its_first_step(steps: tuple[int, ...], same: bool) -> None:
    """One video, no chunk split in two, and severities as with an adapter that knows the numbers."""
    severities = []
    for adapter in (None, said(steps)):
        generator = fork()
        with tokentrim.patched(generator, ObservePolicy(), adapter=adapter) as handle:
            rollout(generator, steps, same)
        assert [(record.video, record.start) for record in handle.report] == [(0, 0), (0, 2), (0, 4), (0, 6)]
        severities.append([record.severity for record in handle.report])
    assert None not in severities[0][1:] and severities[0] == severities[1]


@each_way
@each_commit
def test_the_candidate_is_judged_once_the_steps_are_seen_to_vary(steps: tuple[int, ...], same: bool) -> None:
    """The first chunk that differs shows it, in a warning; the others, and all of the next video, are judged rightly.

    That is: with the severity, and a prune with the video to the bit, that an adapter gets which knows the numbers.
    """
    generator, patches = fork(), ForcedPolicy({3: DEAD})
    with (
        pytest.warns(TokenTrimWarning, match=r"different numbers of denoising calls \(\d, then \d\)") as heard,
        tokentrim.patched(generator, patches, probe="candidate") as handle,
    ):
        rollout(generator, steps, same)
        ours = rollout(generator, steps, same, noise=2)
    assert len(heard) == 1
    with tokentrim.patched(generator, patches, probe="candidate", adapter=said(steps)) as known:
        theirs = rollout(generator, steps, same, noise=2)
    second = [record for record in handle.report if record.video == 1]
    assert [record.severity for record in second] == [record.severity for record in known.report]
    assert [record.pruned for record in second] == [False, False, False, True]
    assert not any(record.notes for record in second) and torch.equal(ours, theirs)


def test_it_is_written_where_a_chunk_was_missed() -> None:
    generator = fork()
    with (
        pytest.warns(TokenTrimWarning, match="use probe='first-step'"),
        tokentrim.patched(generator, ObservePolicy(), probe="candidate") as handle,
    ):
        rollout(generator, (4, 2, 4), same=True)
        rollout(generator, (2, 4, 4), same=True)
    assert [bool(record.notes) for record in handle.report] == [False, True, False, False, False, False]
    assert "not judged: it took 2 calls" in handle.report.records[1].notes[0]


def test_a_chunk_that_ends_at_another_timestep_says_that_it_was_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells its last call from one in the middle."""
    monkeypatch.setitem(globals(), "times_of", lambda count: LEVELS[:count])
    generator = fork()
    with (
        pytest.warns(TokenTrimWarning, match="different numbers"),
        tokentrim.patched(generator, ObservePolicy(), probe="candidate") as handle,
    ):
        rollout(generator, (4, 2, 4, 2), same=True)
    judged = [record.severity is not None for record in handle.report]
    assert judged == [False, False, True, False]
    assert [bool(record.notes) for record in handle.report] == [False, True, False, True]


def test_equal_numbers_cost_no_read() -> None:
    """Timesteps are read only where numbers differ, and those of a video's first chunk in a loop of the user's own."""

    def waits(steps: tuple[int, ...], adapter: Any = None) -> int:
        generator = fork()
        with tokentrim.patched(generator, ObservePolicy(), probe="candidate", adapter=adapter), count_syncs() as log:
            rollout(generator, steps, same=True)
        return sum(event.ours and "pace" in event.place for event in log.events)

    assert waits((3, 3, 3, 3)) == waits((3, 3)) == 2
    assert waits((4, 2, 4, 2), said((4, 2, 4, 2))) == 3
