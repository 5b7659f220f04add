"""An adapter's method, a policy's hook or an observer that fails, or gets Ctrl-C: the next run is a fresh one.

With every kind of model; each part fails once, in the middle of its calls of a video, and at its first call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from interruptions import Subject, nothing_is_open, subject
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

KINDS = (KeyboardInterrupt, ValueError)
METHODS = (
    "identity", "parse", "phase", "restarts", "steps", "changes_prompt", "accepted", "prediction", "in_flight",
    "context", "replay",
)  # fmt: skip
ASKED_BY_ALL = {"identity", "parse", "phase", "prediction", "context", "replay"}


class Failing:
    """Counts the calls of a function; raises at number ``at``, once."""

    def __init__(self, function: Callable[..., Any], at: int = 0, kind: type[BaseException] = ValueError) -> None:
        self.function, self.at, self.kind, self.calls = function, at, kind, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.kind
        return self.function(*args, **kwargs)


def takes(of: Subject) -> frozenset[str]:
    """Hooks of policies that the adapter takes."""
    with tokentrim.patched(of.pipeline, of.policy) as handle:
        return frozenset(handle.adapter.takes)


def counts(target: Any) -> dict[str, int]:
    """How often the adapter is asked what in a pruned video."""
    of = subject(target)
    with tokentrim.patched(of.pipeline, of.policy) as handle:
        for name in METHODS:
            setattr(handle.adapter, name, Failing(getattr(handle.adapter, name)))
        assert torch.equal(of.run(of.pipeline), of.pruned)
        return {name: getattr(handle.adapter, name).calls for name in METHODS}


def next_run_is_fresh(of: Subject, handle: Any, where: str) -> None:
    nothing_is_open()
    assert handle.active, where
    assert torch.equal(of.run(of.pipeline), of.pruned), f"the same pipeline, again, {where}"
    assert [r.chunk for r in handle.report if r.video == handle.report.records[-1].video and r.pruned] == [2], where
    assert torch.equal(of.run(of.other), of.plain), f"another pipeline, never patched, {where}"
    nothing_is_open()


@each_target
def test_an_adapter_that_fails_once(target: Any) -> None:
    of, asked = subject(target), counts(target)
    assert {name for name, times in asked.items() if times} >= ASKED_BY_ALL
    for number, (name, times) in enumerate((name, times) for name, times in asked.items() if times):
        # The first time or in the middle, the other way round in the next model.
        turn = number + TARGETS.index(target)
        kind, at = KINDS[turn % len(KINDS)], (1, (times + 1) // 2)[turn % 2]
        with tokentrim.patched(of.pipeline, of.policy) as handle:
            setattr(handle.adapter, name, Failing(getattr(handle.adapter, name), at, kind))
            with pytest.raises(kind):
                of.run(of.pipeline)
            next_run_is_fresh(of, handle, f"after {kind.__name__} in call {at} of {name}")
        assert torch.equal(of.run(of.pipeline), of.plain), "unpatched"


@dataclass(frozen=True)
class Once(ForcedPolicy):
    """Prunes, and fails once in one of its hooks, at a chunk."""

    hook: str = "judge"
    chunk: int = 2
    kind: type[BaseException] = ValueError
    failed: list[str] = field(default_factory=list)

    def _fail(self, hook: str, chunk: Any) -> None:
        if hook == self.hook and chunk.index == self.chunk and not self.failed:
            self.failed.append(hook)
            raise self.kind

    def judge(self, chunk: Any, history: Any) -> Any:
        self._fail("judge", chunk)
        return super().judge(chunk, history)


class Hiding(Once):
    def hide(self, chunk: Any, context: Any) -> None:
        self._fail("hide", chunk)


class Correcting(Once):
    def correct(self, chunk: Any) -> None:
        self._fail("correct", chunk)


@each_target
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_policy_that_fails_once(target: Any, kind: type[BaseException]) -> None:
    of = subject(target)
    policies = {"judge": Once, "hide": Hiding, "correct": Correcting}
    for hook in sorted(takes(of) & policies.keys()):
        # Behind the first chunk and where it prunes: each kind at one of the two in each model.
        for chunk in ((KINDS.index(kind) + TARGETS.index(target)) % 2 + 1,):
            failing = policies[hook](of.policy.at, hook=hook, chunk=chunk, kind=kind)
            with tokentrim.patched(of.pipeline, failing) as handle:
                with pytest.raises(kind):
                    of.run(of.pipeline)
                assert failing.failed == [hook]
                next_run_is_fresh(of, handle, f"after {kind.__name__} in {hook} of chunk {chunk}")
            assert torch.equal(of.run(of.pipeline), of.plain), "unpatched"


@each_target
def test_ctrl_c_in_an_observer(target: Any) -> None:
    of = subject(target)

    class Watcher:
        on_chunk = Failing(lambda records, latents: None, 2, KeyboardInterrupt)

    with tokentrim.patched(of.pipeline, of.policy, observers=[Watcher()]) as handle:
        with pytest.raises(KeyboardInterrupt):
            of.run(of.pipeline)
        next_run_is_fresh(of, handle, "after Ctrl-C in an observer")
    assert Watcher.on_chunk.calls > 2 and torch.equal(of.run(of.pipeline), of.plain)
