"""A run that is ended from outside, at no place that a test has chosen: by another thread, a timer, an event loop.

An exception that another thread sends, or a signal's handler, comes between any two lines of the thread that runs the
model, which may be in a kernel, in torch or in ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from interruptions import POLICY, Subject, nothing_is_open
from own_loop import calls, last
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim

TIMES = (0.3, 0.6, 0.9)
"""Shares of a run at which it is ended."""


class Ended(BaseException):
    """What another thread, or a timer, ends a run with."""


def send(thread: int, kind: type[BaseException]) -> None:
    """Let ``kind`` come up in a thread, wherever that is."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind)) == 1


def wait_for_it() -> None:
    """The run was faster; or something has swallowed what came (Python ignores what comes up in a finaliser)."""
    for _ in range(1000):
        time.sleep(0.001)
    raise Ended


@contextlib.contextmanager
def sent_by_a_thread(seconds: float) -> Iterator[None]:
    """As servers end a worker; after so many seconds of the processor's time."""
    thread, due, over = threading.get_ident(), time.process_time() + seconds, threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            if time.process_time() > due:
                return send(thread, Ended)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
        wait_for_it()
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def sent_by_a_timer(seconds: float) -> Iterator[None]:
    """As timeouts do that are made of ``signal.setitimer``; this one runs by the processor's time."""

    def handler(_number: int, _frame: Any) -> None:
        raise Ended

    before = signal.signal(signal.SIGPROF, handler)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
        wait_for_it()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def all_is_as_before(subject: Subject, handle: Any, where: str) -> None:
    """Assert that others are as if there were no patch, and that this pipeline's next run is that of a fresh one."""
    nothing_is_open()
    assert handle.active, where
    assert torch.equal(subject.run(subject.other), subject.plain), f"another pipeline, never patched, {where}"
    assert torch.equal(subject.run(subject.pipeline), subject.pruned), f"the same pipeline, again, {where}"
    nothing_is_open()


# It may come amid torch's own bookkeeping, which spoils the process for the tests behind it: seen in one run of four.
at_any_moment = pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "nightly",
    reason="NOT CHECKED: an exception at any moment, in torch's own code too; HYPOTHESIS_PROFILE=nightly does",
)


@at_any_moment
@each_target
@pytest.mark.parametrize("ending", (sent_by_a_thread, sent_by_a_timer), ids=lambda ending: ending.__name__)
def test_a_run_is_ended_at_some_moment(target: Any, ending: Callable[[float], Any]) -> None:
    subject = Subject(target)
    with tokentrim.patched(subject.pipeline, subject.policy) as handle:
        began = time.process_time()
        subject.run(subject.pipeline)
        whole = time.process_time() - began
        for share in TIMES:
            with pytest.raises(Ended), ending(share * whole):
                subject.run(subject.pipeline)
            all_is_as_before(subject, handle, f"after {share} of a run")
    assert torch.equal(subject.run(subject.pipeline), subject.plain), "unpatched"


@each_target
def test_a_task_gives_up_waiting_for_a_thread(target: Any) -> None:
    """``asyncio.wait_for`` ends the waiting, not the thread, which makes its video to the end; then another is made."""
    subject = Subject(target)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(60)

    async def give_up(pool: ThreadPoolExecutor) -> Any:
        job = asyncio.get_running_loop().run_in_executor(pool, subject.run, subject.pipeline)
        try:
            await asyncio.to_thread(inside.wait, 60)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(job), 0.01)
        finally:
            go_on.set()
        return await job

    with tokentrim.patched(subject.pipeline, subject.policy) as handle, ThreadPoolExecutor(1) as pool:
        hook = subject.denoiser.register_forward_pre_hook(wait)
        late = asyncio.run(give_up(pool))
        hook.remove()
        assert torch.equal(late, subject.pruned), "the thread's video"
        all_is_as_before(subject, handle, "after a task has given up")


def test_a_generator_that_is_closed() -> None:
    """GeneratorExit comes up where a loop of the user's own has stopped, between two calls of a pruned video."""
    pipeline = TARGETS[0].make()
    with tokentrim.patched(pipeline, POLICY):
        right = last(calls(pipeline, 1))
        for number in (1, 4, 11, 13, 16):
            video = calls(pipeline, 1)
            for _ in range(number):
                next(video)
            video.close()
            nothing_is_open()
            assert torch.equal(last(calls(pipeline, 1)), right), number
