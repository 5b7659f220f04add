"""A call may end in ways that no hook sees: Ctrl-C, a timeout, a cancelled task. After it nothing of us is at work.

torch runs ``always_call`` hooks for ``Exception`` only. What is looked at afterwards: no tap, another pipeline of the
same code as if there were no tokentrim, the same pipeline's next run as a fresh one, after unpatch as never patched.
"""

from __future__ import annotations

import asyncio

import pytest
import torch
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.pruning.call_scope import BUSY, current_tap
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})


class Timeout(BaseException):
    """As a signal handler raises it, in whatever frame is running."""


KINDS = (KeyboardInterrupt, SystemExit, asyncio.CancelledError, Timeout, ValueError)


class Trap:
    """Raises ``kind`` at the call number ``at`` of ``module``, before it or after it; counts them otherwise."""

    def __init__(self, module, kind=None, at=-1, after=False):
        self.calls, self._kind, self._at = 0, kind, at
        self._hook = module.register_forward_hook(self) if after else module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self._at:
            raise self._kind

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._hook.remove()


def test_the_positions_are_in_the_calls_that_matter():
    """The traps below are set in the chunk that is pruned, in its replay, and behind it."""
    target = TARGETS[0]
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY) as handle, Trap(target.denoiser(pipeline)) as count:
        target.run(pipeline)
    assert handle.report.triggers == 1 and count.calls == 26


@pytest.fixture(scope="module")
def known():
    """Per target: the unpatched video, the pruned video, and how often each depth is called in a pruned run."""
    found = {}
    for target in TARGETS:
        plain, pipeline = target.run(target.make()), target.make()
        depths = target.depths(pipeline)
        counts = {name: Trap(module) for name, module in depths.items()}
        with tokentrim.patched(pipeline, POLICY):
            pruned = target.run(pipeline)
        assert not torch.equal(plain, pruned), target.name
        found[target.name] = plain, pruned, {name: trap.calls for name, trap in counts.items()}
    return found


def interrupted(target, depth, kind, at, known, after=False):
    """Interrupt one run and look at everything that is left."""
    plain, pruned, _ = known[target.name]
    pipeline = target.make()
    handle = tokentrim.patch(pipeline, POLICY)
    with Trap(target.depths(pipeline)[depth], kind, at, after), pytest.raises(kind):
        target.run(pipeline)
    assert current_tap() is None and not BUSY.now
    assert torch.equal(target.run(target.make()), plain), "another pipeline, never patched"
    assert torch.equal(target.run(pipeline), pruned), "the same pipeline, again"
    handle.unpatch()
    assert torch.equal(target.run(pipeline), plain), "unpatched"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", ["denoiser", "block", "attention"])
def test_every_call_of_the_reference_model(kind, depth, known):
    target = TARGETS[0]
    calls = known[target.name][2][depth]
    # Ctrl-C everywhere; the others go the same way, so here and there.
    step = 1 if kind is KeyboardInterrupt and depth == "denoiser" else 9
    for at in range(1, calls + 1, step):
        interrupted(target, depth, kind, at, known, after=at % 2 == 0)


@each_target
@pytest.mark.parametrize("depth", ["denoiser", "block", "attention"])
def test_a_call_of_every_model(target, depth, known):
    calls = known[target.name][2][depth]
    for kind, at in zip((KeyboardInterrupt, Timeout), (calls - 1, max(1, calls // 2)), strict=True):
        interrupted(target, depth, kind, at, known)
