"""A run that is ended from outside, at no place that a test has chosen: by another thread, a timer, an event loop.

An exception that another thread sends, or a signal's handler, comes between any two lines of the thread that runs the
model, which may be in a kernel, in torch or in ours. torch's own lines do not all stand that: one that comes in
``torch.func.vmap`` (block masks of flex attention are made with it) can leave a level of vmap behind for ever, after
which ``torch.randn`` raises in the whole process, tokentrim or not. So each such run has a process of its own, and one
that has left torch spoiled, in code that is not called by ours, is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from interruptions import POLICY, Subject, nothing_is_open
from interruptions import subject as subject_of
from own_loop import calls, last
from targets import TARGETS, each_target
from test_interrupted_lines import is_ours
from tqdm.auto import tqdm

import tokentrim_hooks as tokentrim

TIMES = (0.3, 0.6, 0.9)
"""Shares of a run at which it is ended."""
PATIENCE = 300
"""Seconds after which a process that says nothing is ended."""
TRIES = 5
"""Times that a run is ended at about the same moment until torch is whole afterwards."""


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


def modes() -> tuple[Any, ...]:
    """Modes of torch that a block of code enters and leaves."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._functorch.peek_interpreter_stack() is None,
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        str(torch._C._dispatch_tls_local_include_set()),
        str(torch._C._dispatch_tls_local_exclude_set()),
        torch.compiler.is_compiling(),
    )


def came_in_ours(failure: BaseException) -> bool:
    """Whether an exception came in code of ours, or in what torch and Python's library do for it."""
    files = [frame.filename for frame in traceback.extract_tb(failure.__traceback__)]
    callers = (file for file in reversed(files) if not ("/torch/" in file or "contextlib" in file or file == __file__))
    return is_ours(next(callers, __file__))


def ended(subject: Subject, seconds: float, ending: Callable[[float], Any]) -> str:
    """End a run, and look at what is left; the word "torch" where that is torch's own doing, "" where all is well."""
    before, kept = modes(), None
    handle = tokentrim.patch(subject.pipeline, subject.policy)
    try:
        with ending(seconds):
            subject.run(subject.pipeline)
    except Ended as end:
        kept = end
    except Exception as failure:  # of torch, in the course of being ended
        kept = failure
    assert kept is not None, "was not ended"
    ours, left = came_in_ours(kept), f"{before} -> {modes()} after {kept!r}"
    if not ours and (modes() != before or not isinstance(kept, Ended)):
        return "torch"
    assert isinstance(kept, Ended) and modes() == before, left
    all_is_as_before(subject, handle, f"after {seconds} seconds")
    handle.unpatch()
    assert torch.equal(subject.run(subject.pipeline), subject.plain), "unpatched"
    return ""


def in_a_process_of_its_own(function: Callable[[], str]) -> str:
    """What ``function`` returns, or how it failed; nothing that it leaves behind is left here."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        words = "the process was ended"
        # Its default is shared by processes: one that was ended as it held it would stop all others for ever.
        tqdm.set_lock(threading.RLock())
        try:
            words = function()
        except BaseException:
            words = traceback.format_exc()
        finally:
            os.write(writes, words.encode()[-4000:])
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        if not select.select([answer], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
        words = answer.read()
    _, status = os.waitpid(child, 0)
    return words if not status else f"died: {status}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="NOT CHECKED: this system cannot fork a process")
@each_target
@pytest.mark.parametrize("ending", (sent_by_a_thread, sent_by_a_timer), ids=lambda ending: ending.__name__)
def test_a_run_is_ended_at_some_moment(target: Any, ending: Callable[[float], Any]) -> None:
    subject = subject_of(target)
    with tokentrim.patched(subject.pipeline, subject.policy):
        began = time.process_time()
        subject.run(subject.pipeline)
        whole = time.process_time() - began
    for share in TIMES:
        for turn in range(TRIES):
            seconds = (share + 0.01 * turn) * whole
            words = in_a_process_of_its_own(lambda seconds=seconds: ended(subject, seconds, ending))
            if words != "torch":
                break
        assert not words, f"after {share} of a run: {words}"


def test_a_process_that_was_spoiled_is_seen_as_such() -> None:
    """What keeps the test above from blaming us for torch's own, and torch for ours."""
    before = modes()
    level = torch._C._functorch._vmap_increment_nesting(3, "error")
    with pytest.raises(RuntimeError, match="vmap"):
        torch.randn(3)
    assert modes() != before
    torch._C._functorch._vmap_decrement_nesting()
    assert level == 1 and modes() == before
    with pytest.raises(RuntimeError) as failure:
        tokentrim.unmark([torch.empty(0).expand(-3)])
    assert not came_in_ours(failure.value)
    with pytest.raises(Exception, match=r".") as failure:
        tokentrim.patch(None)
    assert came_in_ours(failure.value)
    assert "assert 0" in in_a_process_of_its_own(_fails)


def _fails() -> str:
    assert 0
    return ""


@each_target
def test_a_task_gives_up_waiting_for_a_thread(target: Any) -> None:
    """``asyncio.wait_for`` ends the waiting, not the thread, which makes its video to the end; then another is made."""
    subject = subject_of(target)
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
