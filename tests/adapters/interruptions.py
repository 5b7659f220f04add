"""Every place where a denoiser call can be interrupted, and all that is looked at after it was."""

from __future__ import annotations

import asyncio
import functools
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from targets import Target
from torch import Tensor
from torch.nn import functional

import tokentrim_hooks as tokentrim
from tokentrim_hooks.pruning.call_scope import BUSY, current_scope
from tokentrim_hooks.testing import ForcedPolicy, assert_same, fingerprint

POLICY = ForcedPolicy({2: [0, 3]})
KERNEL = "scaled_dot_product_attention"


class Timeout(BaseException):
    """As a signal handler raises it, from a frame of its own on top of whatever is running."""


def _in_another_frame() -> None:
    def handler(_number: int, _frame: Any) -> None:
        raise Timeout

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def raising(kind: type[BaseException]) -> Callable[[], None]:
    """What raises ``kind``."""

    def action() -> None:
        if kind is Timeout:
            _in_another_frame()
        raise kind

    return action


KINDS = (KeyboardInterrupt, SystemExit, asyncio.CancelledError, Timeout, GeneratorExit, ValueError)


def unpatch_here(handle: Any) -> None:
    """From a hook of somebody else, in the same thread."""
    handle.unpatch()


def unpatch_in_a_thread(handle: Any) -> None:
    """From another thread, which the call waits for."""
    thread = threading.Thread(target=handle.unpatch)
    thread.start()
    thread.join()


@dataclass(frozen=True)
class Event:
    """Something that happens in a run: a module (or an attention kernel) is entered or left.

    ``call`` counts denoiser calls, replays too; ``depth`` is 1 for the denoiser's own hooks, 0 for a kernel.
    """

    number: int
    call: int
    depth: int
    where: str


class Events:
    """Watches a run from hooks of somebody else; ``act()`` at event ``at``. Keeps what the denoiser was given."""

    def __init__(self, denoiser: torch.nn.Module, at: int = -1, act: Callable[[], None] | None = None) -> None:
        self.seen: list[Event] = []
        self.given: list[Tensor] = []
        self._denoiser, self._at, self._act, self._depth = denoiser, at, act, 0
        self._attend = getattr(functional, KERNEL)
        self._hooks = ExitStack()
        for name, module in denoiser.named_modules():
            self._watch(name or "denoiser", module)
        self._hooks.enter_context(mock.patch.object(functional, KERNEL, self._kernel))

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self._denoiser:
                self._depth = 0
                self.given.append(_first_tensor(args, kwargs))
            self._depth += 1
            self._note(self._depth, f"before {name}")

        def leave(*_: Any) -> None:
            self._note(self._depth, f"behind {name}")
            self._depth -= 1

        self._hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        self._hooks.callback(module.register_forward_hook(leave).remove)

    def _kernel(self, *args: Any, **kwargs: Any) -> Any:
        self._note(0, "in an attention kernel")
        return self._attend(*args, **kwargs)

    def _note(self, depth: int, where: str) -> None:
        self.seen.append(Event(len(self.seen), len(self.given), depth, where))
        if len(self.seen) - 1 == self._at and self._act is not None:
            self._act()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._hooks.close()


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)).clone()


def _tensors(kept: Any) -> Iterator[Tensor]:
    """What a pipeline keeps of a video: in attributes, and in lists and dicts of them."""
    if torch.is_tensor(kept) and kept.is_floating_point():
        yield kept
    elif isinstance(kept, dict | list | tuple):
        for item in kept.values() if isinstance(kept, dict) else kept:
            yield from _tensors(item)


def nothing_is_open() -> None:
    """Assert that no denoiser call is thought to be under way."""
    assert current_scope() is None, "a scope is open"
    assert not BUSY.now and not BUSY._scopes, "a call is thought to be busy"


@dataclass(frozen=True)
class Course:
    """A patched run that nothing interrupts: its events, what the denoiser was given, its calls by what they are.

    Attributes:
        proofs: how many calls prove that a call can be made twice; none where that was proved before.
        replay: number of the call on the pruned context, behind these.
    """

    events: list[Event]
    given: list[Tensor]
    proofs: int
    replay: int

    @property
    def proof(self) -> int:
        """Number of the first call that proves."""
        return self.replay - self.proofs

    @property
    def before_prune(self) -> int:
        """Number of the first event behind which something is dead."""
        return self.first_of(self.replay)

    def first_of(self, call: int) -> int:
        """Number of the first event of a call."""
        return next(event.number for event in self.events if event.call == call)


class Subject:
    """A model, its videos as they should be, and the events of runs in which a chunk is pruned.

    A patched model's first run has ``target.proofs`` calls more than later ones: before the first prune it is proved
    that a call can be made twice, and in a cache where rows are. One that counts its calls has one more in each, for
    each prune of it is proved.
    """

    def __init__(self, target: Target, policy: Any = POLICY, **options: Any) -> None:
        self.target, self.policy, self.options = target, policy, options
        self.other, self.pipeline = target.make(), target.make()
        self.plain = self.run(self.other)
        with Events(self.denoiser) as unpatched:
            assert torch.equal(self.run(self.pipeline), self.plain)
        self._unpatched = unpatched.given
        with tokentrim.patched(self.pipeline, policy, **options) as handle:
            self.pruned, self.first = self._course(handle)
            again, self.later = self._course(handle)
        assert handle.report.triggers == 2 and torch.equal(again, self.pruned)
        assert self.first.proofs == self.later.proofs + target.proofs
        assert not torch.equal(self.plain, self.pruned)

    def _course(self, handle: Any) -> tuple[Tensor, Course]:
        """One video of the patched pipeline, and how it was made."""
        proofs = -sum(record.proof_calls for record in handle.report)
        with Events(self.denoiser) as run:
            video = self.run(self.pipeline)
        proofs += sum(record.proof_calls for record in handle.report)
        # The first call that is not as in the unpatched run repeats the one before it.
        same = [torch.equal(a, b) for a, b in zip(run.given, self._unpatched, strict=False)]
        repeated = 1 + (same.index(False) if False in same else len(same))
        assert len(run.given) == len(self._unpatched) + 1 + proofs
        return video, Course(run.seen, run.given, proofs, repeated + proofs)

    @property
    def denoiser(self) -> torch.nn.Module:
        """That of the pipeline that is interrupted."""
        return self.target.denoiser(self.pipeline)

    def run(self, pipeline: Any) -> Tensor:
        """One video."""
        return self.target.run(pipeline)

    def places(self, seed: int = 0) -> list[Event]:
        """An event of every denoiser call at every depth, chosen at random among those there are."""
        choice = random.Random(seed)
        by_place: dict[tuple[int, int], list[Event]] = {}
        for event in self.first.events:
            by_place.setdefault((event.call, event.depth), []).append(event)
        return [choice.choice(found) for _, found in sorted(by_place.items())]

    # ------------------------------------------------------------------------------------------ one interruption

    def interrupt(self, event: Event, *kinds: type[BaseException]) -> None:
        """Interrupt a run after another one at the same place, then look at everything that is left."""
        # A replay that fails, or a kernel on what we left of its keys, is our failure: with "warn" we step aside.
        ours = not event.depth or self.first.proof <= event.call <= self.first.replay
        on_error = "warn" if event.number % 2 and not ours else "raise"
        handle = tokentrim.patch(self.pipeline, self.policy, on_error=on_error, **self.options)
        try:
            for turn, kind in enumerate(kinds):
                self._broken_off(event, kind, proven=turn > 0 and self._proven(event))
                assert handle.active, "a failure of the model was taken for one of ours"
            assert torch.equal(self.run(self.other), self.plain), "another pipeline, never patched"
            self.as_fresh(handle, proven=self._proven(event))
        finally:
            handle.unpatch()
        assert torch.equal(self.run(self.pipeline), self.plain), "unpatched"

    def _proven(self, event: Event) -> bool:
        """Whether it came behind what is shown once."""
        return event.call >= self.first.proof + self.target.proofs

    def _broken_off(self, event: Event, kind: type[BaseException], proven: bool) -> None:
        """Interrupt a run at an event of the first one, which has moved where the proof was made before."""
        course, at = (self.later, event.number - self._events_of_proof) if proven else (self.first, event.number)
        with Events(self.denoiser, at, raising(kind)) as run:
            try:
                self.run(self.pipeline)
                raise AssertionError("was not interrupted")
            except kind:
                pass
        nothing_is_open()
        # What was broken off before left no trace in the calls of this run.
        assert all(torch.equal(a, b) for a, b in zip(run.given, course.given, strict=False)), "not as a fresh run"
        assert run.seen == course.events[: at + 1]

    @property
    def _events_of_proof(self) -> int:
        return len(self.first.events) - len(self.later.events)

    def as_fresh(self, handle: Any, proven: bool = False) -> None:
        """Assert that a patched pipeline's next run is that of a fresh one, its records too."""
        before = {record.video for record in handle.report}
        assert torch.equal(self.run(self.pipeline), self.pruned), "the same pipeline, again"
        records = [record for record in handle.report if record.video not in before]
        assert [r.chunk for r in records if r.pruned] == [2] and len({r.video for r in records}) == 1
        course = self.later if proven else self.first
        assert sum(r.proof_calls for r in records) == course.proofs
        made = sum(sum(r.phases.values()) + r.extra_calls + r.proof_calls for r in records)
        assert made + self.target.beside == len(course.given)
        nothing_is_open()

    def unpatch_amid(self, event: Event, unpatch: Callable[[Any], None]) -> None:
        """The patch comes off in the middle of a call, which goes on."""
        before = fingerprint(self.denoiser)
        handle = tokentrim.patch(self.pipeline, self.policy, **self.options)
        try:
            with Events(self.denoiser, event.number, lambda: unpatch(handle)):
                video = self.run(self.pipeline)
            nothing_is_open()
            assert not tokentrim.is_patched(self.pipeline) and bool(torch.isfinite(video).all())
            assert_same(before, fingerprint(self.denoiser))
            assert all(bool(kept.isfinite().all()) for kept in _tensors(vars(self.pipeline))), "a mark is left"
            assert event.number >= self.first.before_prune or torch.equal(video, self.plain), "nothing had been pruned"
        finally:
            handle.unpatch()
        assert torch.equal(self.run(self.other), self.plain), "another pipeline, never patched"
        assert torch.equal(self.run(self.pipeline), self.plain), "unpatched"


@functools.cache
def subject(target: Target) -> Subject:
    """The same for all tests of a process: whatever has ended a run of it, the next is that of a fresh one."""
    return Subject(target)
