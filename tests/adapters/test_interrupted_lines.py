"""Ctrl-C may come between any two lines, of ours too: afterwards all is as if it had come in the model.

Signals reach a program between its lines, and so do exceptions that another thread sends. With
``HYPOTHESIS_PROFILE=nightly`` at every line of ours that a pruned video runs through, the first time, the last and once
in between; else at a few, and where a chunk begins and ends.
"""

from __future__ import annotations

import functools
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tokentrim_hooks_adapters
import torch
from interruptions import Subject, nothing_is_open
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FEW = 5
"""Lines of a model at which a call is interrupted where not all are tried."""
HANDOVERS = {"classify", "_begin_chunk", "_new_video", "finish_chunk", "publish", "_tell", "take", "begin", "steps"}
"""Functions in which a session, a chunk or a record passes from one state to another."""
OURS = tuple(str(Path(str(package.__file__)).resolve().parent) for package in (tokentrim, tokentrim_hooks_adapters))
NO_PATCH = tuple(f"{OURS[0]}/{room}/" for room in ("reference", "testing"))


@functools.cache
def is_ours(file: str) -> bool:
    """Whether a file is of the patch or of an adapter; the reference model is a user's."""
    place = str(Path(file).resolve())
    return place.startswith(OURS) and not place.startswith(NO_PATCH)


class Lines:
    """Lines of ours that run in a block, as (file, line, function); Ctrl-C at number ``at`` of them."""

    def __init__(self, at: int = -1) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self._at = at

    def _calls(self, frame: Any, _event: str, _argument: Any) -> Any:
        return self._lines if is_ours(frame.f_code.co_filename) else None

    def _lines(self, frame: Any, event: str, _argument: Any) -> Any:
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            if len(self.seen) - 1 == self._at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._lines

    def __enter__(self) -> Lines:
        sys.settrace(self._calls)
        return self

    def __exit__(self, *failure: Any) -> None:
        sys.settrace(None)


@functools.cache
def course(target: Any) -> tuple[Subject, list[tuple[str, int, str]]]:
    """A model, and the lines of ours that its first patched video runs through."""
    subject = Subject(target)
    # A call that another test has left to Ctrl-C is let go of by whoever looks first: here, lest its lines be counted.
    nothing_is_open()
    with tokentrim.patched(subject.pipeline, subject.policy), Lines() as lines:
        assert torch.equal(subject.run(subject.pipeline), subject.pruned)
    return subject, lines.seen


def times(target: Any) -> dict[tuple[str, int, str], list[int]]:
    """When each line runs."""
    found: dict[tuple[str, int, str], list[int]] = {}
    for number, line in enumerate(course(target)[1]):
        found.setdefault(line, []).append(number)
    return found


def chosen(target: Any) -> list[int]:
    """Every line at three times, or a few at any."""
    choice = random.Random(TARGETS.index(target))
    every = times(target)
    if NIGHTLY:
        return sorted({n for when in every.values() for n in (when[0], when[-1], choice.choice(when))})
    return [choice.choice(every[line]) for line in choice.sample(sorted(every), FEW)]


def interrupt(target: Any, at: int) -> None:
    """Interrupt a run at a line, then look at everything that is left."""
    subject, seen = course(target)
    handle = tokentrim.patch(subject.pipeline, subject.policy)
    nothing_is_open()
    try:
        with Lines(at) as lines, pytest.raises(KeyboardInterrupt):
            subject.run(subject.pipeline)
        where = f"after Ctrl-C at {seen[at]}"
        assert lines.seen == seen[: at + 1], where
        nothing_is_open()
        assert handle.active, where
        assert torch.equal(subject.run(subject.other), subject.plain), f"another pipeline, never patched, {where}"
        assert torch.equal(subject.run(subject.pipeline), subject.pruned), f"the same pipeline, again, {where}"
        latest = [record for record in handle.report if record.video == handle.report.records[-1].video]
        assert [record.chunk for record in latest if record.pruned] == [2], where
    finally:
        handle.unpatch()
    assert torch.equal(subject.run(subject.pipeline), subject.plain), f"unpatched, {where}"


@each_target
def test_ctrl_c_at_a_line_of_ours(target: Any) -> None:
    for at in chosen(target):
        interrupt(target, at)


def test_ctrl_c_where_a_chunk_passes_from_hand_to_hand() -> None:
    """At each such line of the reference model's course, at one of the times that it runs."""
    found = {line: when for line, when in times(TARGETS[0]).items() if line[2] in HANDOVERS}
    assert {line[2] for line in found} == HANDOVERS
    for number, line in enumerate(sorted(found)):
        when = found[line]
        interrupt(TARGETS[0], when[number % len(when)])
