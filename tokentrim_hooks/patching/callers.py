"""Who makes the running call: whose methods lead to it, and in which thread or asyncio task its video is made.

A pipeline may hand calls to other threads or tasks and wait for them. Such a thread has no method of the pipeline on
its stack, or none that began the video; the one that waits has. So a strand (a thread or task) works for another one
where that waits for it: in ``Thread.join``, in ``Future.result``, or by ``await``. Where nobody waits yet, as for the
second of two calls that were handed over, one that was given nothing but the call itself works for whom there is.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import inspect
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, Generic, Protocol, cast

from torch import nn

from tokentrim_hooks.errors import SessionError
from tokentrim_hooks.inspection import holds

OURS = ("tokentrim_hooks.patching", "tokentrim_hooks.rollout", "tokentrim_hooks.pruning")
HANDS_OVER = ("threading.", "concurrent.futures.", "asyncio.", "multiprocessing.pool.")
MACHINERY = ("torch.", "wrapt.", *HANDS_OVER, *OURS)
"""Modules whose methods lie between a sampler and the call that we watch; those of threads keep what they were given.
"""
PATIENCE = 0.05
"""Seconds in which whoever has handed a call to another thread begins to wait for it."""
GENERAL = (object, abc.ABC, Generic, Protocol, nn.Module)
"""Classes that objects of any kind derive from."""

_waited_for_nobody: weakref.WeakSet[object] = weakref.WeakSet()


def strand(model: object = None) -> object:
    """The thread or asyncio task that is running: an adapter's :meth:`identity` where no memory tells videos apart.

    With the ``model`` it is the one in which its method makes the video, if that has handed the call to another.

    Raises:
        SessionError: several make videos with this model, and nothing tells for which of them this one works.
    """
    here = _running()
    if model is None or here is threading.main_thread():
        return here
    own = _run_of(model, _frames_of(here))
    runs = {other: _run_of(model, _frames_of(other)) for other in _others(here)}
    return _for_whom(here, [other for other, run in runs.items() if run is not None and run is not own]) or here


def is_driven_by(model: object, denoiser: object) -> bool:
    """Whether ``model`` makes the running call of its ``denoiser``, and not another object that shares it.

    Pipelines share components (``Pipe(**pipe.components)``) and functions, so the call alone does not tell. The nearest
    caller of the model's own kind does; that of a helper which holds the denoiser counts only where the model itself is
    not on the way. Loops outside of any object are the model's. A thread with no caller at all works for another.

    Raises:
        SessionError: the model and another object wait for threads, and nothing tells for which of them this one works.
    """
    if model is denoiser:
        return True
    driven = _drives(model, denoiser, _methods(_stack()))
    here = _running()
    if driven is not None or here is threading.main_thread():
        return driven is not False
    answers = {other: _drives(model, denoiser, _methods(_frames_of(other))) for other in _others(here)}
    other = _for_whom(here, [one for one, answer in answers.items() if answer is not None], answers)
    return other is None or answers[other] is not False


def _running() -> object:
    with contextlib.suppress(RuntimeError):  # no event loop in this thread
        task = asyncio.current_task()
        if task is not None:
            return task
    return threading.current_thread()


def _run_of(model: object, frames: Iterable[FrameType]) -> CodeType | None:
    """The model's method that makes a video: the outermost one of those that are running."""
    run = None
    for frame in frames:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if code.co_name != "forward" and not is_machinery(module) and method_of(frame) is model:
            run = code
    return run


def _drives(model: object, denoiser: object, callers: Iterable[object]) -> bool | None:
    """Whether the callers, innermost first, are the model's; None where there is none that says."""
    helper = None
    for caller in callers:
        if caller is denoiser:
            continue  # its own __call__, whoever has called that
        if caller is model or holds(model, caller):
            return True
        if holds(caller, model):
            continue
        if _related(caller, model):
            return False
        if holds(caller, denoiser):
            helper = caller
    return None if helper is None else False


def _related(one: object, other: object) -> bool:
    """Whether two objects have a class in common beside the most general ones."""
    shared = set(type(one).__mro__) & set(type(other).__mro__)
    return any(kind not in GENERAL and "Mixin" not in kind.__name__ for kind in shared)


# ------------------------------------------------------------------------------------------ threads and tasks


def _for_whom(here: object, candidates: list[object], kinds: dict[object, bool | None] | None = None) -> object:
    """For which other strand this one works; None if it is for none. Those of one kind need not be told apart."""
    found = _who_waits(here, candidates) if candidates else []
    if len({kinds[one] for one in found} if kinds else found) > 1:
        raise SessionError(
            "a thread calls the denoiser for another one, and several are making videos with it.\n"
            "Make one video after the other, or let each thread call the denoiser of its video itself."
        )
    return found[0] if found else None


def _who_waits(here: object, candidates: list[object]) -> list[object]:
    """Those that wait for this strand; those that might, where it was given a call, or a function of their own, alone.

    Who has just handed something over is about to wait. That is awaited once per strand, for no longer than it takes.
    """
    handed, until = _handed_to(here), time.monotonic() + (0 if here in _waited_for_nobody else PATIENCE)
    while True:
        waiting = [other for other in candidates if _waits(other, handed)]
        found = waiting or [other for other in candidates if _was_given_by(here, other)]
        if found or time.monotonic() >= until:
            break
        time.sleep(0.001)
    if not found:
        _waited_for_nobody.add(here)
    return found


def _was_given_by(here: object, other: object) -> bool:
    """Whether all that this strand runs is the call itself, or functions that were made in ``other``'s frames."""
    made = {const for frame in _frames_of(other) for const in frame.f_code.co_consts if isinstance(const, CodeType)}
    return all(_is_no_samplers(frame) or frame.f_code in made for frame in _frames_of(here))


def _handed_to(here: object) -> list[object]:
    """What others wait for while this strand is running: itself, and futures of what it was given to do."""
    items = [getattr(owner, "future", None) for owner in map(method_of, _frames_of(here))]
    return [here, *(item for item in items if item is not None)]


def _waits(other: object, handed: list[object]) -> bool:
    """Whether a strand waits for one of these, in a method of theirs or by ``await``."""
    if not isinstance(other, asyncio.Task):
        return any(method_of(frame) is thing for frame in _frames_of(other) for thing in handed)
    awaited = getattr(other, "_fut_waiter", None)
    # A future of asyncio's stands for that of a thread: what it calls when it is done knows the other one.
    calls = [call for call, *_ in getattr(awaited, "_callbacks", None) or ()]
    cells = [cell.cell_contents for call in calls for cell in getattr(call, "__closure__", None) or ()]
    return any(one is thing for one in (awaited, *cells) for thing in handed)


def _others(here: object) -> list[object]:
    """The other threads, and the tasks of the event loops that they run; of this thread, too, if ``here`` is a task."""
    threads = threading.enumerate()
    loops = {owner for thread in threads for owner in map(method_of, _whole(thread)) if _is_loop(owner)}
    tasks = [task for loop in loops for task in asyncio.all_tasks(cast(asyncio.AbstractEventLoop, loop))]
    return [other for other in (*threads, *tasks) if other is not here]


def _is_loop(owner: object) -> bool:
    return isinstance(owner, asyncio.AbstractEventLoop)


def _frames_of(one: object) -> list[FrameType]:
    """The frames of a strand, the innermost first; of a thread those below the event loop that it runs."""
    if isinstance(one, asyncio.Task):
        return list(_awaiting(one.get_coro()))[::-1]
    frames = list(_whole(one))
    loops = [place for place, frame in enumerate(frames) if _is_loop(method_of(frame))]
    return frames[loops[-1] + 1 :] if loops else frames


def _awaiting(coroutine: Any) -> Iterator[FrameType]:
    """The frames of a coroutine and of those that it awaits."""
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        yield frame
        coroutine = coroutine.cr_await


def _whole(thread: Any) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread.ident)
    return iter(()) if frame is None else _stack(frame)


def _is_no_samplers(frame: FrameType) -> bool:
    """Whether a frame is a thread's own, a module's or ours."""
    module = str(frame.f_globals.get("__name__", ""))
    return is_machinery(module) or module.startswith("tokentrim_hooks") or isinstance(method_of(frame), nn.Module)


# ------------------------------------------------------------------------------------------ frames


def _stack(frame: FrameType | None = None) -> Iterator[FrameType]:
    """The frames that lead to ``frame``, or to whoever asks, the innermost first."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _methods(frames: Iterable[FrameType]) -> Iterator[object]:
    """``self`` of the methods that are running; those of torch and of this package left out."""
    for frame in frames:
        if not is_machinery(frame.f_globals.get("__name__", "")) and (caller := method_of(frame)) is not None:
            yield caller


def method_of(frame: FrameType) -> object:
    """The object whose method is running in a frame; None in a function."""
    code = frame.f_code
    return _local(frame, "self") if code.co_argcount and code.co_varnames[0] == "self" else None


@functools.lru_cache(maxsize=1024)
def is_machinery(module: object) -> bool:
    """Whether code of a module of this name lies between a caller and a hook, and is no caller itself."""
    return f"{module}.".startswith(MACHINERY)


def _local(frame: FrameType, name: str) -> object:
    found = frame.f_locals
    value = found.get(name)
    if type(found) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.getrefcount(found) == 3:
        # Before Python 3.13 a copy that the frame keeps, and all tensors; who called locals() has one reference more.
        found.clear()
    return value
