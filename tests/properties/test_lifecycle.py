"""Any order of patch, unpatch, run, failure and reset leaves the model as it was whenever the patch is off."""

import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.testing import ForcedPolicy, assert_same, fingerprint
from tokentrim_hooks.testing.checks import Injected, Tripwire, assert_raises


def run(pipeline, seed):
    torch.manual_seed(seed)
    return pipeline.inference(torch.randn(1, 8, 3, 8, 8), ["a"], return_latents=True)[1]


class Lifecycle(RuleBasedStateMachine):
    @initialize()
    def make(self):
        tiny = {"layers": 1, "dim": 16, "grid": (2, 2), "num_frame_per_block": 2}
        self.pipeline = ReferencePipeline.random(local_attn_size=6, **tiny)
        self.plain = run(self.pipeline, 0)
        self.original = fingerprint(self.pipeline)
        self.handle = None
        self.observing = True

    @precondition(lambda self: self.handle is None)
    @rule()
    def observe(self):
        self.handle, self.observing = tokentrim.patch(self.pipeline, tokentrim.ObservePolicy()), True

    @precondition(lambda self: self.handle is None)
    @rule()
    def prune(self):
        self.handle, self.observing = tokentrim.patch(self.pipeline, ForcedPolicy({2: (1,)})), False

    @precondition(lambda self: self.handle is not None)
    @rule()
    def patch_again(self):
        assert_raises(tokentrim.AlreadyPatchedError, lambda: tokentrim.patch(self.pipeline))
        self.handle = tokentrim.patch(self.pipeline, tokentrim.ObservePolicy(), replace=True)
        self.observing = True

    @precondition(lambda self: self.handle is not None)
    @rule()
    def unpatch(self):
        self.handle.unpatch()
        self.handle.unpatch()
        self.handle = None

    @rule()
    def generate(self):
        same = torch.equal(run(self.pipeline, 0), self.plain)
        assert same == (self.handle is None or self.observing)

    @rule()
    def fail(self):
        with Tripwire(at=100):
            assert_raises(Injected, lambda: run(self.pipeline, 0))

    @precondition(lambda self: self.handle is not None)
    @rule()
    def reset(self):
        self.handle.reset()

    @invariant()
    def off_means_as_it_was(self):
        if hasattr(self, "handle"):
            assert tokentrim.is_patched(self.pipeline) == (self.handle is not None)
            if self.handle is None:
                assert_same(self.original, fingerprint(self.pipeline))

    def teardown(self):
        if getattr(self, "handle", None) is not None:
            self.handle.unpatch()


Lifecycle.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestLifecycle = Lifecycle.TestCase
