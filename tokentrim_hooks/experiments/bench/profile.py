"""Where the time of a rollout goes, by wrapping tokentrim's own functions; no source of the model is touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.regeneration import Regenerator
from tokentrim_hooks.rollout.rollout import Rollout

SECTIONS: dict[str, tuple[tuple[type, str], ...]] = {
    "drift": ((Regenerator, "_drift"), (Rollout, "_remember")),
    "judge and read": ((Regenerator, "_judge"),),
    "prune": ((Pruner, "prune"), (Pruner, "check")),
    "tap": ((CallTap, "attend"),),
    "replay": ((Regenerator, "_replay"),),
    "bookkeeping": ((Rollout, "before"), (Rollout, "after"), (Rollout, "leave")),
}
"""Our functions by what they are for; what is called within is counted under its own name."""
MODEL = "model and sampler"


@dataclass
class Clock:
    """Exclusive time by section: while an inner section runs, the outer one stands still."""

    synchronise: Callable[[], None]
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    since: float = 0.0

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the block under ``name``."""
        self._turn()
        self.stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self.stack.pop()

    def _turn(self) -> None:
        self.synchronise()
        now = self.clock()
        if self.stack:
            self.seconds[self.stack[-1]] = self.seconds.get(self.stack[-1], 0.0) + now - self.since
        self.since = now

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the whole, which add up to 1."""
        total = sum(self.seconds.values())
        return {name: self.seconds.get(name, 0.0) / total for name in [MODEL, *SECTIONS]} if total else {}


def profile(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Share of each section in one rollout of a model that the caller patches inside ``run``.

    Attention on live keys is the model's (or the replay's) time; only choosing and gathering the keys is the tap's. On
    a GPU the queue is drained at each border, which slows the rollout: the shares are for telling parts apart.
    """
    # As for the ratios: on a CPU what was computed, not what other processes took.
    clock = Clock(_synchroniser(device), time.perf_counter if _on_gpu(device) else time.process_time)
    with ExitStack() as stack:
        for name, functions in SECTIONS.items():
            for owner, attribute in functions:
                timed = _tap(clock, name) if name == "tap" else _timed(getattr(owner, attribute), clock, name)
                stack.enter_context(mock.patch.object(owner, attribute, timed))
        stack.enter_context(clock.section(MODEL))
        run()
    return clock.shares


def _timed(function: Callable[..., Any], clock: Clock, name: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.section(name):
            return function(*args, **kwargs)

    return timed


def _tap(clock: Clock, name: str) -> Callable[..., Any]:
    """The tap around an attention that is counted where the denoiser call is."""
    original = CallTap.attend

    def attend(self: CallTap, inner: Callable[..., Any], *args: Any) -> Any:
        whose = "replay" if "replay" in clock.stack else MODEL
        with clock.section(name):
            return original(self, _timed(inner, clock, whose), *args)

    return attend


def _synchroniser(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if _on_gpu(device) else lambda: None


def _on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"
