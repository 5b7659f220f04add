"""Ctrl-C may come between any two lines, of ours too: afterwards all is as if it had come in the model.

Signals reach a program between its lines, and so do exceptions that another thread sends. With
``HYPOTHESIS_PROFILE=nightly`` at every line of ours that a pruned video runs through, the first time, the last and once
in between; else at a few, and where a chunk begins and ends.
"""

from __future__ import annotations

import contextvars
import functools
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokentrim_hooks_adapters
import torch
from interruptions import nothing_is_open, subject
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FEW = 3
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


Line = tuple[str, int, str]
"""File, number, function."""


class Lines:
    """Lines of ours that run in a block; Ctrl-C when ``line`` runs for the ``nth`` time (from 0)."""

    def __init__(self, line: Line | None = None, nth: int = 0) -> None:
        self.seen: list[Line] = []
        self._line, self._left = line, nth

    def _calls(self, frame: Any, _event: str, _argument: Any) -> Any:
        return self._lines if is_ours(frame.f_code.co_filename) else None

    def _lines(self, frame: Any, event: str, _argument: Any) -> Any:
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            if self.seen[-1] == self._line:
                self._left -= 1
                if self._left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
        return self._lines

    def __enter__(self) -> Lines:
        sys.settrace(self._calls)
        return self

    def __exit__(self, *failure: Any) -> None:
        sys.settrace(None)


@functools.cache
def course(target: Any) -> Counter[Line]:
    """How often each line of ours runs in a model's first patched video."""
    of = subject(target)
    with tokentrim.patched(of.pipeline, of.policy), Lines() as lines:
        assert torch.equal(of.run(of.pipeline), of.pruned)
    return Counter(lines.seen)


def chosen(target: Any) -> list[tuple[Line, int]]:
    """Every line at three times, or a few at any."""
    choice, every = random.Random(TARGETS.index(target)), course(target)
    if NIGHTLY:
        return [(line, nth) for line, n in every.items() for nth in sorted({0, n - 1, choice.randrange(n)})]
    return [(line, choice.randrange(every[line])) for line in choice.sample(sorted(every), FEW)]


def interrupt(target: Any, line: Line, nth: int) -> None:
    """Interrupt a run at a line, then look at everything that is left."""
    of, where = subject(target), f"after Ctrl-C at {line}"
    handle = tokentrim.patch(of.pipeline, of.policy)
    try:
        with Lines(line, nth), pytest.raises(KeyboardInterrupt):
            of.run(of.pipeline)
        nothing_is_open()
        assert handle.active, where
        assert torch.equal(of.run(of.other), of.plain), f"another pipeline, never patched, {where}"
        assert torch.equal(of.run(of.pipeline), of.pruned), f"the same pipeline, again, {where}"
        latest = [record for record in handle.report if record.video == handle.report.records[-1].video]
        assert [record.chunk for record in latest if record.pruned] == [2], where
    finally:
        handle.unpatch()
    assert torch.equal(of.run(of.pipeline), of.plain), f"unpatched, {where}"


def each_alike(function: Callable[..., object], target: Any, *arguments: object) -> None:
    """Run it with no context variables and as far up the stack as others: ours walk through both, line by line.

    Tests that ran before have set some, and may have left a call there to whoever looks first.
    """
    subject(target)  # not made in there
    contextvars.Context().run(function, target, *arguments)


@each_target
def test_ctrl_c_at_a_line_of_ours(target: Any) -> None:
    each_alike(course, target)
    for line, nth in chosen(target):
        each_alike(interrupt, target, line, nth)


def test_ctrl_c_where_a_chunk_passes_from_hand_to_hand() -> None:
    """At each such line of the reference model's course, at one of the times that it runs."""
    each_alike(course, TARGETS[0])
    found = {line: times for line, times in course(TARGETS[0]).items() if line[2] in HANDOVERS}
    assert {line[2] for line in found} == HANDOVERS
    for number, line in enumerate(sorted(found)):
        each_alike(interrupt, TARGETS[0], line, number % found[line])
