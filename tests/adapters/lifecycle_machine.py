"""Any order of patch, run, interruption, failure, thread, copy, replacement and unpatch, of two pipelines.

What runs unpatched, or is not what was patched, is bit-identical to never patched; what runs patched is what a fresh
patch gives, whatever happened before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interruptions import KINDS, Events, nothing_is_open, raising, unpatch_here, unpatch_in_a_thread
from lifecycle_kits import Reference, alone, count_of_events, patch, saved, swapped
from test_ended_between_calls import Between

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import assert_same, fingerprint
from tokentrim_hooks.testing.checks import assert_raises


@contextlib.contextmanager
def idleness_is_told():
    """A patch that has seen one chunk, or another pipeline's calls only, says so; that one may share the scheduler."""
    with warnings.catch_warnings():
        for words in ("tokentrim was patched in, but", "tokentrim recorded"):
            warnings.filterwarnings("ignore", words, tokentrim.TokenTrimWarning)
        yield


@contextlib.contextmanager
def joined_amid_a_chunk(video):
    """A patch that came amid a chunk has seen some of its calls only: it judges the next one early, and says so."""
    with warnings.catch_warnings():
        if video.mode is None:
            words = "chunks take different numbers of denoising calls"
            warnings.filterwarnings("ignore", words, tokentrim.TokenTrimWarning)
        yield


class Lifecycle(RuleBasedStateMachine):
    kit: Any = Reference

    @initialize()
    def make(self):
        self.handle, self.mode, self.on_error = None, "unpatched", "raise"
        self.others, self.theirs = None, "unpatched"
        self.hooks, self.videos = [], []
        self._new_pipeline()
        self.other = self.kit().make()

    def _new_pipeline(self):
        self.pipeline = self.kit().make()
        self.right("unpatched", self.pipeline)  # some pipelines make parts of themselves in their first run
        self._remember()

    def _remember(self):
        self.original = fingerprint(self.denoiser)

    @property
    def denoiser(self):
        return getattr(self.pipeline, self.kit.part)

    def right(self, mode, pipeline):
        assert torch.equal(self.kit().run(pipeline), alone(self.kit, mode)), f"not as a fresh pipeline, {mode}"

    def _off(self):
        self.handle, self.mode = None, "unpatched"
        self._changed()

    def _changed(self):
        for video in self.videos:
            video.mode = None

    @precondition(lambda self: self.handle is None)
    @rule(number=st.integers(1, 99), on_error=st.sampled_from(("raise", "warn")))
    def patch(self, number, on_error):
        self._patch(number, on_error)

    @precondition(lambda self: self.handle is not None)
    @rule(number=st.integers(1, 99), on_error=st.sampled_from(("raise", "warn")))
    def patch_again(self, number, on_error):
        assert_raises(tokentrim.AlreadyPatchedError, lambda: tokentrim.patch(self.pipeline))
        self._patch(number, on_error, replace=True)

    def _patch(self, number, on_error, **options):
        self.mode = self.kit.modes[1:][number % len(self.kit.modes[1:])]
        self.on_error = on_error
        self.handle = patch(self.pipeline, self.mode, on_error=on_error, **options)
        self._changed()

    @precondition(lambda self: self.handle is not None)
    @rule(how=st.sampled_from((unpatch_here, unpatch_in_a_thread)))
    def unpatch(self, how):
        with idleness_is_told():
            how(self.handle)
        self.handle.unpatch()
        self._off()

    @precondition(lambda self: self.handle is not None)
    @rule()
    def reset(self):
        self.handle.reset()
        self._changed()

    # ------------------------------------------------------------------------------------------ videos

    @rule()
    def generate(self):
        before = set() if self.handle is None else {record.video for record in self.handle.report}
        with Events(self.denoiser) as events:
            self.right(self.mode, self.pipeline)
        if self.handle is not None:
            self._told_truly([r for r in self.handle.report if r.video not in before], len(events.given))

    def _told_truly(self, records, made):
        assert len({record.video for record in records}) == 1
        assert [r.chunk for r in records] == [*range(self.kit.chunks)]
        calls = sum(sum(r.phases.values()) + r.extra_calls + r.proof_calls for r in records)
        assert calls + self.kit.beside == made
        pruned = sorted(getattr(self.handle.policy, "at", ()))
        assert [r.chunk for r in records if r.pruned] == pruned
        assert all(r.regenerations == r.pruned and (r.dead > 0) == r.pruned for r in records)

    @rule()
    def another_pipeline(self):
        self.right(self.theirs, self.other)

    @rule(number=st.integers(1, 99))
    def another_patch(self, number):
        """On the other pipeline, or off it: both patches may tap the same functions, and come off in any order."""
        if self.others is None:
            self.theirs = self.kit.modes[1:][number % len(self.kit.modes[1:])]
            self.others = patch(self.other, self.theirs)
        else:
            with idleness_is_told():
                self.others.unpatch()
            self.others, self.theirs = None, "unpatched"

    @rule()
    def one_that_shares_components(self):
        other = self.kit().sharing(self.pipeline)
        assert not tokentrim.is_patched(other)
        self.right("unpatched", other)

    @rule()
    def another_thread(self):
        # Both are made before: a fresh pipeline draws its weights from the process's random stream.
        wanted, _ = alone(self.kit, self.theirs), alone(self.kit, self.mode)
        with ThreadPoolExecutor(2) as pool:
            # Loops that draw from the process's stream take turns; else both models run at the same time.
            theirs = pool.submit(lambda: torch.equal(self.kit().run(self.other), wanted))
            if self.kit.own_generators:
                self.right(self.mode, self.pipeline)
            assert theirs.result(), "another pipeline, in another thread"

    # ------------------------------------------------------------------------------------------ whatever ends a call

    @rule(kind=st.sampled_from(KINDS), place=st.integers(0, 10**6))
    def interrupt(self, kind, place):
        # A kernel that fails on what we left of its keys is our failure: with "warn" we step aside.
        kind = KeyboardInterrupt if kind is ValueError and self.on_error == "warn" else kind
        at = place % count_of_events(self.kit, self.mode)
        with Events(self.denoiser, at, raising(kind)):
            assert_raises(kind, lambda: self.kit().run(self.pipeline))

    @rule(kind=st.sampled_from((KeyboardInterrupt, ValueError)), at=st.integers(1, 8))
    def leave_between_two_calls(self, kind, at):
        """In the sampler, where no hook is."""
        with Between(self.denoiser, at, kind):
            assert_raises(kind, lambda: self.kit().run(self.pipeline))

    @precondition(lambda self: self.handle is not None)
    @rule(place=st.integers(0, 10**6), how=st.sampled_from((unpatch_here, unpatch_in_a_thread)))
    def unpatch_amid_a_call(self, place, how):
        at = place % count_of_events(self.kit, self.mode)
        with idleness_is_told(), Events(self.denoiser, at, lambda: how(self.handle)):
            assert torch.isfinite(self.kit().run(self.pipeline)).all()
        self._off()

    # ------------------------------------------------------------------------------------------ copies

    @precondition(lambda self: not self.hooks)  # those of this test cannot be pickled
    @rule(how=st.sampled_from((copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: saved(x))))
    def copied(self, how):
        other = self.kit().sharing(self.pipeline)
        setattr(other, self.kit.part, how(self.denoiser))
        assert not tokentrim.is_patched(other) and not tokentrim.is_patched(getattr(other, self.kit.part))
        self.right("unpatched", other)
        mode = self.kit.modes[-1]
        with patch(other, mode):  # a copy is patched like any model
            self.right(mode, other)
        self.right("unpatched", other)

    @precondition(lambda self: not self.hooks)
    @rule(how=st.sampled_from(("copy", "other", "class")))
    def replaced(self, how):
        old = self.denoiser
        new = {"copy": copy.deepcopy, "class": swapped, "other": lambda _: getattr(self.kit().make(), self.kit.part)}
        setattr(self.pipeline, self.kit.part, new[how](old))
        self.right("unpatched", self.pipeline)
        if self.handle is not None:
            with pytest.warns(tokentrim.TokenTrimWarning, match="was replaced after the patch"):
                self.handle.unpatch()
        setattr(self.pipeline, self.kit.part, old)
        self._off()

    # ------------------------------------------------------------------------------------------ code of others

    @rule(prepend=st.booleans(), before=st.booleans())
    def a_hook_of_others(self, prepend, before):
        register = self.denoiser.register_forward_pre_hook if before else self.denoiser.register_forward_hook
        self.hooks.append(register(lambda *_: None, prepend=prepend).remove)

    @rule()
    def a_forward_of_others(self):
        denoiser, forward = self.denoiser, self.denoiser.forward

        @functools.wraps(forward)
        def wrapped(*args, **kwargs):
            return forward(*args, **kwargs)

        had = "forward" in vars(denoiser)
        denoiser.forward = wrapped
        self.hooks.append(lambda: setattr(denoiser, "forward", forward) if had else delattr(denoiser, "forward"))

    @precondition(lambda self: self.hooks)
    @rule()
    def others_leave(self):
        while self.hooks:
            self.hooks.pop()()

    @invariant()
    def nothing_is_under_way(self):
        nothing_is_open()

    @invariant()
    def off_means_as_it_was(self):
        if not hasattr(self, "handle"):
            return
        assert tokentrim.is_patched(self.pipeline) == (self.handle is not None)
        if self.handle is None and not self.hooks:
            assert "_tokentrim_handle" not in vars(self.pipeline)
        if self.handle is self.others is None and not self.hooks:  # a function that both patches tap is one
            assert_same(self.original, fingerprint(self.denoiser))

    def teardown(self):
        for handle in (getattr(self, "handle", None), getattr(self, "others", None)):
            if handle is not None:
                with idleness_is_told():
                    handle.unpatch()
