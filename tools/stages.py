"""What our part of a chunk consists of, by stage, beside a loop written by hand: ``python tools/stages.py``.

The model's forward is a constant, as in hook_path.py; latents ``[1, 3, 16, H, W]``, five calls a chunk, ObservePolicy.
Functions are wrapped with a clock that stops while an inner one runs, so that stages add up. CPU time of one thread;
videos with the clocks, without them, written by hand and unpatched take turns; medians over all their chunks. What no
stage has is torch's: its hooks, and the guard that keeps them out of its compiler.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import statistics
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from hook_path import TOKENS, by_hand, chunks, constant, observed

import tokentrim_hooks as tokentrim
from tokentrim_hooks.experiments.bench.ideal import Ideal
from tokentrim_hooks.policy.drift import Summary
from tokentrim_hooks.rollout import regeneration
from tokentrim_hooks.rollout.records import Recorder
from tokentrim_hooks.rollout.regeneration import Regenerator
from tokentrim_hooks.rollout.rollout import Rollout
from tokentrim_hooks.rollout.session import Session
from tokentrim_hooks.rollout.sessions import Sessions

STAGES: dict[str, list[tuple[Any, str]]] = {
    "before 5 calls: arguments by name": [(Rollout, "before")],
    "before 5 calls: whose video it is": [(Sessions, "of")],
    "before 5 calls: which phase, marks": [(Session, "before")],
    "behind 5 calls: whose call it was, caches made anew": [(Rollout, "after"), (Rollout, "leave")],
    "behind 5 calls: state of chunk and video": [(Session, "after")],
    "judging: two means over the frames, one drift": [(Summary, "of"), (Summary, "drift")],
    "judging: the policy (top-k, severity, threshold)": [(tokentrim.ObservePolicy, "judge")],
    "judging: one read, made numbers of Python": [(regeneration, "read")],
    "judging: checks of answers": [(Regenerator, "judge")],
    "the record": [(Recorder, "publish")],
    "written by hand: all but means and drift": [(Ideal, "__call__")],
}
WARM = 4


class Clock:
    """Seconds by stage, each without those of stages inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        now = time.thread_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, on this clock."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._open.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        # A call's frame is looked for behind our package's own, so this must look like one of them.
        names = {"__name__": Rollout.__module__, "__builtins__": builtins}
        ours = types.FunctionType(run.__code__, names, closure=run.__closure__)
        return functools.wraps(function)(ours)

    @contextmanager
    def on(self) -> Iterator[None]:
        """While functions of all stages are on it."""
        with ExitStack() as stack:
            for stage, places in STAGES.items():
                for owner, name in places:
                    found = vars(owner).get(name) or getattr(owner, name)
                    inner = found.__func__ if isinstance(found, classmethod) else found
                    timed = self.timed(stage, inner)
                    as_it_was = classmethod(timed) if isinstance(found, classmethod) else timed
                    stack.enter_context(mock.patch.object(owner, name, as_it_was))
            yield


def by_chunk(tokens: int, count: int, watched: Callable[[Any], Any], clock: Clock) -> list[dict[str, float]]:
    """Milliseconds of each chunk of a video, by stage and in all."""
    model, rows = constant(tokens), []
    with watched(model):
        video, since = chunks(model, count), time.thread_time()
        for _ in video:
            now = time.thread_time()
            rows.append({stage: 1000 * s for stage, s in clock.seconds.items()} | {"in all": 1000 * (now - since)})
            clock.seconds.clear()
            since = time.thread_time()
    return rows[WARM:]


def functions(tokens: int, watched: Callable[[Any], Any], count: int = 12) -> float:
    """Functions of Python that a chunk runs into because it is watched, torch's and those of hooks among them."""
    model, found = constant(tokens), []
    for watch in (nullcontext, watched):
        calls, stamps = 0, []

        def note(_frame: Any, event: str, _argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        with watch(model):
            sys.setprofile(note)
            try:
                stamps += [calls for _ in chunks(model, count)]
            finally:
                sys.setprofile(None)
        found.append((stamps[-1] - stamps[2]) / (count - 3))
    return found[1] - found[0]


def measure(tokens: int, rounds: int, count: int) -> None:
    """Print one size."""
    arms: dict[str, tuple[Callable[[Any], Any], bool]] = {
        "unpatched": (nullcontext, False),
        "patched": (observed, False),
        "patched, with clocks": (observed, True),
        "by hand": (by_hand, False),
        "by hand, with clocks": (by_hand, True),
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (watched, clocked) in arms.items():
            clock = Clock()
            with clock.on() if clocked else nullcontext():
                rows[name] += by_chunk(tokens, count, watched, clock)
    middle = {name: _medians(found) for name, found in rows.items()}
    nothing = middle["unpatched"]["in all"]
    for arm, watched in (("patched", observed), ("by hand", by_hand)):
        clocked = middle[f"{arm}, with clocks"]
        whole = clocked.pop("in all") - nothing
        print(f"{tokens} tokens, {arm}: {middle[arm]['in all'] - nothing:.3f} ms a chunk, {whole:.3f} with clocks")
        print(f"  functions of Python that it runs into: {functions(tokens, watched):.0f}")
        for stage in (name for name in STAGES if name in clocked):
            print(f"  {clocked[stage]:.3f}  {stage}")
        print(f"  {whole - sum(clocked.values()):.3f}  torch's hooks and what keeps them out of its compiler, clocks")


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=(64, 1560), choices=TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=40, help="Of a video.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in options.tokens:
        measure(tokens, options.rounds, options.chunks)
