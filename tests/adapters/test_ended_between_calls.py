"""Ctrl-C in the sampler, between two denoiser calls, where no hook of ours is: the next video is a fresh one.

Its first call looks like one more denoising call of the chunk that was broken off. Taken for that, the next video's
first chunk would have more calls than it has, in its records and for whoever waits for its last one.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import tiny_reference
import torch
import torch.nn.attention.flex_attention as flex
from interruptions import Subject, nothing_is_open
from targets import TARGETS, each_target

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

KINDS = (KeyboardInterrupt, ValueError)


class Between:
    """Ends a run when the sampler's call number ``at`` of a denoiser has come back, our hooks behind it too."""

    def __init__(self, denoiser: torch.nn.Module, at: int = 0, kind: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls = self._depth = 0
        self._denoiser, self._at, self._kind = denoiser, at, kind

    def _call(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is not self._denoiser:
            return torch.nn.Module.__call__(module, *args, **kwargs)
        self._depth += 1
        try:
            output = torch.nn.Module.__call__(module, *args, **kwargs)
        finally:
            self._depth -= 1
        self.calls += not self._depth
        if self.calls == self._at and not self._depth:
            raise self._kind
        return output

    def __enter__(self) -> Between:
        type(self._denoiser).__call__ = lambda module, *args, **kwargs: self._call(module, *args, **kwargs)
        return self

    def __exit__(self, *failure: Any) -> None:
        del type(self._denoiser).__call__


def interrupt(subject: Subject, at: int, kind: type[BaseException], held: bool = False) -> None:
    """End a run behind a call; ``held``: somebody keeps the traceback, and with it all that the run had."""
    with tokentrim.patched(subject.pipeline, subject.policy, **subject.options) as handle:
        with Between(subject.denoiser, at, kind), pytest.raises(kind) as failure:
            subject.run(subject.pipeline)
        if not held:
            del failure
        nothing_is_open()
        subject.as_fresh(handle, proven=bool(handle._rollout.shared.proof.repeated))


@each_target
def test_a_run_is_ended_between_two_calls(target: Any) -> None:
    """At each of the first chunk's calls, and at one in the middle of the video."""
    with mock.patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, create=True):
        subject = Subject(target)
        with Between(subject.denoiser) as run:
            subject.run(subject.pipeline)
        for at in (*range(1, 5), run.calls // 2):
            interrupt(subject, at, KINDS[at % 2])


def test_a_run_whose_traceback_somebody_keeps() -> None:
    """As a notebook does."""
    subject = Subject(TARGETS[0])
    for at in (1, 2, 4, 5, 12):
        interrupt(subject, at, KeyboardInterrupt, held=True)


@pytest.mark.parametrize("at", (1, 3))
def test_the_last_call_of_the_next_videos_chunks_is_known(at: int) -> None:
    """With the candidate probe, which judges at the last call: nothing is judged early, late or with a warning."""
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, ForcedPolicy({1: [0, 3]}), probe="candidate") as handle:
        right = tiny_reference.run(pipeline)
    assert handle.report.triggers == 1
    with tokentrim.patched(pipeline, ForcedPolicy({1: [0, 3]}), probe="candidate") as handle:
        with Between(pipeline.generator, at), pytest.raises(KeyboardInterrupt):
            tiny_reference.run(pipeline)
        assert torch.equal(tiny_reference.run(pipeline), right)
        assert [record.phases for record in handle.report][1:3] == [{"first": 1, "refine": 3, "commit": 1}] * 2


class Own:
    """A loop of the user's own, in the module of whoever calls it."""

    def __init__(self) -> None:
        self.pipeline = tiny_reference.make()
        self.held: Any = None

    def video(self, stop: int = 0) -> None:
        """One chunk of four steps; Ctrl-C behind one of them."""
        noise, held = torch.randn(1, 2, 3, 8, 8), Own.__new__(Own)
        self.held = weakref.ref(held)
        self.pipeline._reset_caches(noise, 2)
        for step in range(1, 5):
            self.call(noise + step, torch.full((1, 2), 1000 - 200 * step))
            if step == stop:
                raise KeyboardInterrupt

    def call(self, latents: torch.Tensor, timestep: torch.Tensor) -> None:
        """By way of another function."""
        with torch.no_grad():
            self.pipeline._call(latents, timestep, self.pipeline.text_encoder(text_prompts=["a"]), 0)


@pytest.mark.filterwarnings("ignore:tokentrim recorded 3 chunks")
def test_a_loop_of_the_users_own_is_told_from_its_caller() -> None:
    """Both lie in one module, whose functions by which a chunk's calls are made are known from the first video on."""
    own = Own()
    with tokentrim.patched(own.pipeline, tokentrim.ObservePolicy()) as handle:
        own.video()
        with pytest.raises(KeyboardInterrupt):
            own.video(stop=2)
        gc.collect()
        assert own.held() is None, "what the loop had is kept alive"
        own.video()
        assert [record.phases.get("refine", 0) for record in handle.report] == [3, 1, 3]
