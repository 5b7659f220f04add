"""Is a call one more of the chunk in progress, or another video's first? Frames tell it, else the timestep does.

A video that was left in its first chunk, between two calls, in each kind of loop; and what marks on frames must not do:
disturb a tracer, hide from a debugger, keep what the sampler had, or make the host wait.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import tiny_reference
import torch
from test_ended_between_calls import Between
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import count_syncs

STEPS = (1000.0, 750.0, 500.0, 250.0)
WHOLE = {"first": 1, "refine": 3, "commit": 1}
pytestmark = pytest.mark.filterwarnings("ignore:tokentrim recorded")


def call(pipeline: Any, latents: Tensor, timestep: float, chunk: int = 0) -> None:
    """A call as a sampler makes it."""
    caches = {"kv_cache": pipeline.kv_cache1, "crossattn_cache": pipeline.crossattn_cache}
    level, start = torch.full((1, 2), timestep), 2 * chunk * pipeline.frame_seq_length
    with torch.no_grad():
        pipeline.generator(latents, {"prompt_embeds": None}, level, current_start=start, **caches)


def fresh(pipeline: Any) -> Tensor:
    """Noise for a video, which begins with the caches of the one before."""
    noise = torch.randn(1, 4, 3, 8, 8)
    pipeline._reset_caches(noise, 4)
    return noise


def in_one_frame(pipeline: Any, stop: int) -> None:
    """Three videos of two chunks; the second one is left behind a call of its first chunk."""
    for video in range(3):
        noise = fresh(pipeline)
        for chunk in range(2):
            for number, step in enumerate((*STEPS, 0.0)):
                call(pipeline, noise[:, 2 * chunk : 2 * chunk + 2], step, chunk)
                if video == 1 and number + 1 == stop:
                    break
            if video == 1:
                break


def in_a_function(pipeline: Any, stop: int) -> None:
    """The same by a function for each video."""
    for at in (0, stop, 0):
        in_steps(pipeline, at)


def in_steps(pipeline: Any, stop: int) -> None:
    """One video."""
    for _ in steps_of(pipeline, stop):
        pass


def steps_of(pipeline: Any, stop: int) -> Iterator[None]:
    """Its calls, one by one."""
    noise = fresh(pipeline)
    for chunk in range(2):
        for number, step in enumerate((*STEPS, 0.0)):
            call(pipeline, noise[:, 2 * chunk : 2 * chunk + 2], step, chunk)
            yield
            if number + 1 == stop:
                return


def in_generators(pipeline: Any, stop: int) -> None:
    """The same by generators; the one that is left stays alive."""
    left = steps_of(pipeline, stop)
    in_steps(pipeline, 0)
    for _ in range(stop):
        next(left)
    in_steps(pipeline, 0)
    assert next(left, None) is None


def in_threads(pipeline: Any, stop: int) -> None:
    """The same with a thread for each call, whose stack says nothing of the loop."""
    for at in (0, stop, 0):
        for _ in in_thread(steps_of(pipeline, at)):
            pass


def in_thread(steps: Iterator[None]) -> Iterator[None]:
    """Advance an iterator in threads."""
    ended: list[bool] = []
    while not ended:
        thread = threading.Thread(target=lambda: ended.append(True) if next(steps, steps) is steps else None)
        thread.start()
        thread.join()
        yield


@contextmanager
def observed(pipeline: Any) -> Iterator[Any]:
    """Patched, with nothing pruned."""
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle:
        yield handle


@pytest.mark.parametrize("stop", (1, 2, 4))
@pytest.mark.parametrize("loop", (in_one_frame, in_a_function, in_generators, in_threads))
def test_a_video_is_left_in_its_first_chunk(loop: Callable[[Any, int], None], stop: int) -> None:
    """Where the chunk that was left has as many calls as it had, the next video's has as many as it should."""
    pipeline = tiny_reference.make()
    with observed(pipeline) as handle:
        loop(pipeline, stop)
    made = [sum(record.phases.values()) for record in handle.report if not record.chunk]
    assert made == [5, stop, 5]


def test_the_first_video_of_all_is_left_behind_its_first_call() -> None:
    pipeline = tiny_reference.make()
    with observed(pipeline) as handle:
        for stop in (1, 0):
            in_steps(pipeline, stop)
    assert [sum(record.phases.values()) for record in handle.report if not record.chunk] == [1, 5]


@pytest.mark.parametrize("at", (1, 2, 4))
def test_the_next_video_is_made_from_the_same_noise(at: int) -> None:
    """In the same memory, as that of a sampler which calls twice at a step."""
    pipeline, noise = tiny_reference.make(), torch.randn(1, 4, 3, 8, 8)
    with observed(pipeline) as handle:
        pipeline.inference(noise, ["a"])
        with Between(pipeline.generator, at), pytest.raises(KeyboardInterrupt):
            pipeline.inference(noise, ["a"])
        pipeline.inference(noise, ["b"])
    first = [record.phases for record in handle.report if not record.chunk]
    assert [sum(phases.values()) for phases in first] == [5, at, 5] and first[0] == first[2] == WHOLE


class Engine:
    """Has the model, and makes each call by a method that ends; calls twice at a step, with the same latents."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.model = pipeline, pipeline.generator

    def predict(self, latents: Tensor, step: float, chunk: int) -> None:
        call(self.pipeline, latents, step, chunk)


def test_two_calls_of_a_step_are_no_new_video() -> None:
    pipeline = tiny_reference.make()
    engine = Engine(pipeline)
    with observed(pipeline.generator) as handle:
        for _ in range(2):
            noise = fresh(pipeline)
            for chunk in range(2):
                for step in STEPS:
                    latents = noise[:, 2 * chunk : 2 * chunk + 2] + step
                    for _ in range(2):
                        engine.predict(latents, step, chunk)
    assert [(record.video, sum(record.phases.values())) for record in handle.report] == [(0, 8), (0, 8), (1, 8), (1, 8)]


def test_the_timestep_of_a_pipelines_calls_is_not_read() -> None:
    pipeline = tiny_reference.make()
    with observed(pipeline), count_syncs() as log:
        pipeline.inference(torch.randn(1, 2, 3, 8, 8), ["a"])
    assert not [event for event in log.ours if "pace.py" in event.place]


class Application:
    """Has a pipeline, and goes on when a video was left: its own frame stays."""

    def __init__(self) -> None:
        self.pipeline = tiny_reference.make()

    def videos(self, stops: tuple[int, ...]) -> None:
        for stop in stops:
            with Between(self.pipeline.generator, stop), suppress(KeyboardInterrupt):
                self.pipeline.inference(torch.randn(1, 4, 3, 8, 8), ["a"])


@pytest.mark.parametrize("stops", ((1, 0), (3, 0), (0, 1, 0), (0, 4, 2, 0)))
def test_an_application_makes_the_next_video_after_one_that_was_left(stops: tuple[int, ...]) -> None:
    application = Application()
    with observed(application.pipeline) as handle:
        application.videos(stops)
    made = [sum(record.phases.values()) for record in handle.report if not record.chunk]
    assert made == [stop or 5 for stop in stops]


# ------------------------------------------------------------------------------------------ tracers

class Pdb:
    """What ``pdb.set_trace()`` and ``continue`` do to frames, amid a chunk."""

    def __init__(self) -> None:
        self.lines = 0

    def trace(self, *_: Any) -> Any:
        """The tracer."""
        self.lines += 1
        return self.trace

    def set_trace(self, *_: Any) -> None:
        """From a hook, at each call."""
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            frames.append(frame)
            frame.f_trace = self.trace
            frame = frame.f_back
        sys.settrace(self.trace)
        sys.settrace(None)
        for frame in frames:
            del frame.f_trace


@pytest.mark.parametrize("at", (1, 2, 3))
def test_a_debugger_amid_a_chunk_changes_nothing(at: int) -> None:
    pipeline, pdb = tiny_reference.make(), Pdb()
    plain = tiny_reference.run(pipeline)
    with observed(pipeline) as handle:
        hook = pipeline.generator.register_forward_hook(pdb.set_trace)
        assert torch.equal(tiny_reference.run(pipeline), plain)
        with Between(pipeline.generator, at), pytest.raises(KeyboardInterrupt):
            tiny_reference.run(pipeline)
        assert torch.equal(tiny_reference.run(pipeline), plain)
        hook.remove()
    first = [record.phases for record in handle.report if not record.chunk]
    assert first[0] == first[2] == WHOLE and sum(first[1].values()) == at


@pytest.mark.parametrize("early", (True, False), ids=("before", "amid"))
def test_a_tracer_sees_what_it_sees_without_us(early: bool) -> None:
    """One of the whole run, as coverage's, and one that is set amid a chunk: the sampler's calls and lines."""

    def lines(patched: bool) -> list[tuple[str, str, int]]:
        seen: list[tuple[str, str, int]] = []
        pipeline, before, count = tiny_reference.make(), sys.gettrace(), [0]

        def trace(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code.co_filename.endswith(("reference/pipeline.py", "tiny_reference.py")):
                seen.append((frame.f_code.co_name, event, frame.f_lineno))
            return trace

        def begin(*_: Any) -> None:
            count[0] += 1
            if count[0] == 3:
                sys.settrace(trace)

        handle = tokentrim.patch(pipeline, tokentrim.ObservePolicy()) if patched else None
        pipeline.generator.register_forward_pre_hook(begin)
        sys.settrace(trace if early else None)
        try:
            tiny_reference.run(pipeline)
        finally:
            sys.settrace(before)
        if handle is not None:
            handle.unpatch()
        return seen

    assert lines(patched=True) == lines(patched=False) != []


# ------------------------------------------------------------------------------------------ memory

def test_what_a_run_had_is_freed_when_it_ends_whatever_ends_it() -> None:
    """By its last reference: no cycle waits for the garbage collector."""
    pipeline, kept = tiny_reference.make(), []

    def encode(*_: Any, **__: Any) -> dict[str, Tensor]:
        held = torch.zeros(8)
        kept.append(weakref.ref(held))
        return {"prompt_embeds": None, "held": held}

    pipeline.text_encoder.forward = encode
    with observed(pipeline):
        tiny_reference.run(pipeline)
        gc.collect()
        gc.disable()
        try:
            for at in (0, 1, 3):
                with Between(pipeline.generator, at), suppress(KeyboardInterrupt):
                    tiny_reference.run(pipeline)
                assert len(kept) == 1 or kept[-1]() is None, at
        finally:
            gc.enable()
    assert len(kept) == 4


class Script:
    """A user's own, which keeps what ``locals()`` has given."""

    def __init__(self) -> None:
        self.pipeline = tiny_reference.make()

    def inference(self, seed: int) -> list[str]:
        settings = locals()
        for step in STEPS:
            call(self.pipeline, torch.randn(1, 2, 3, 8, 8), step + 0 * seed)
        return sorted(settings)


def test_what_locals_has_given_to_a_method_is_not_emptied() -> None:
    """Before Python 3.13 the frame has one dict of its variables, which others see, too."""
    script = Script()
    fresh(script.pipeline)
    with observed(script.pipeline):
        assert {"self", "seed"} <= set(script.inference(1))
