"""Any order of patch, run, interruption, failure, thread, copy, replacement and unpatch leaves all videos right.

The machine is in ``tests/adapters/lifecycle_machine.py``. Here it drives loops of the user's own as well, and each
model of diffusers.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from lifecycle_kits import DIFFUSERS, alone
from lifecycle_machine import Lifecycle, joined_amid_a_chunk
from own_loop import calls, last

from tokentrim_hooks.pruning.tombstones import alive_rows

pytestmark = pytest.mark.filterwarnings("ignore:tokentrim recorded")
"""Three videos in a row that are left behind their first chunk are rightly told of, at any later call."""


@dataclass
class Video:
    """One that a loop of the user's own makes, call by call; ``mode`` is None once the patch was changed meanwhile."""

    seed: int
    mode: str | None
    calls: Any
    cache: list[Any] = field(default_factory=list)


class OwnLoops(Lifecycle):
    """Videos that a loop of the user's own makes, call by call: two at a time, broken off, in threads."""

    @precondition(lambda self: len(self.videos) < 2)
    @rule(seed=st.integers(1, 3))
    def begin(self, seed):
        video = Video(seed, self.mode, calls(self.pipeline, seed))
        next(video.calls)
        # Its own: the pipeline's next run must not reset it.
        video.cache, self.pipeline.kv_cache1 = self.pipeline.kv_cache1, None
        self.videos.append(video)

    @precondition(lambda self: self.videos)
    @rule(which=st.integers(0, 1), by=st.integers(1, 8))
    def advance(self, which, by):
        video = self.videos[which % len(self.videos)]
        for _ in range(by):
            with joined_amid_a_chunk(video):
                latest = next(video.calls, None)
            if latest is None:
                self.videos.remove(video)
                return

    @precondition(lambda self: self.videos)
    @rule(which=st.integers(0, 1))
    def finish(self, which):
        video = self.videos.pop(which % len(self.videos))
        with joined_amid_a_chunk(video):
            self._check(video, last(video.calls))

    def _check(self, video, made):
        assert torch.isfinite(made).all()
        if video.mode is not None:
            assert torch.equal(made, alone(self.kit, video.mode, video.seed)), "not as if it were alone"

    @precondition(lambda self: self.videos)
    @rule(which=st.integers(0, 1))
    def break_off(self, which):
        self.videos.pop(which % len(self.videos)).calls.close()

    @precondition(lambda self: len(self.videos) == 2)
    @rule()
    def finish_in_threads(self):
        with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as told:
            for video in self.videos:
                told.enter_context(joined_amid_a_chunk(video))
            for video, made in zip(self.videos, pool.map(lambda v: last(v.calls), self.videos), strict=True):
                self._check(video, made)
        self.videos = []

    @invariant()
    def no_mark_outlives_the_patch(self):
        if getattr(self, "handle", None) is None:
            for video in getattr(self, "videos", ()):
                assert all(bool(alive_rows(layer["v"]).all()) for layer in video.cache)


MODELS = {kit.__name__: type(f"Lifecycle of {kit.__name__}", (Lifecycle,), {"kit": kit}) for kit in DIFFUSERS}
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
for machine in (OwnLoops, *MODELS.values()):
    few = {"max_examples": 8 if machine is OwnLoops else 4, "stateful_step_count": 12}
    size = {"max_examples": 150, "stateful_step_count": 30} if NIGHTLY else few
    machine.TestCase.settings = settings(deadline=None, **size)
TestLifecycle = OwnLoops.TestCase


@pytest.mark.parametrize("model", MODELS)
def test_lifecycle_of_a_model(model):
    """Those of diffusers; each has keys of another layout."""
    run_state_machine_as_test(MODELS[model], settings=MODELS[model].TestCase.settings)
