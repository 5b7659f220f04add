"""A loop that calls ``model.forward(...)`` goes past all hooks: said at the first of these calls, and at the end."""

from __future__ import annotations

import copy
import pickle
import warnings

import own_loop
import pytest
import tiny_reference as tiny
import torch
from targets import each_target
from torch import nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks.patching.bypass import Bypass
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
WORDS = r"the forward of {} was called directly, .*\nCall it as denoiser\(...\)"


class Past:
    """A denoiser as a loop sees it that calls its forward."""

    def __init__(self, denoiser):
        self._denoiser = denoiser

    def __call__(self, *args, **kwargs):
        return self._denoiser.forward(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._denoiser, name)


class Loop:
    """What a loop of the user's own takes: a pipeline with something else in the place of its generator."""

    def __init__(self, pipeline, generator):
        self._pipeline, self.generator = pipeline, generator

    def __getattr__(self, name):
        return getattr(self._pipeline, name)


class CausalWrapper(nn.Module):
    """As upstream wrappers are: hands on all that it is given to a forward that is not its own."""

    def __init__(self, forward, scheduler):
        super().__init__()
        self.onward, self.scheduler = forward, scheduler

    def forward(self, *args, **kwargs):
        return self.onward(*args, **kwargs)


class CheckpointWrapper(CausalWrapper):
    """As wrappers for checkpointing and logging are: has the denoiser as a part, and calls its forward."""

    def __init__(self, denoiser):
        super().__init__(None, denoiser.scheduler)
        self._checkpoint_wrapped_module = denoiser

    def forward(self, *args, **kwargs):
        return self._checkpoint_wrapped_module.forward(*args, **kwargs)


def bare(pipeline):
    return Loop(pipeline, Past(pipeline.generator))


def wrapped(pipeline):
    return Loop(pipeline, CheckpointWrapper(pipeline.generator))


def kept(pipeline):
    """By a method that was kept before the patch."""
    return Loop(pipeline, CausalWrapper(pipeline.generator.forward, pipeline.generator.scheduler))


@pytest.mark.parametrize("way", (bare, wrapped, kept), ids=lambda way: way.__name__)
@pytest.mark.parametrize("given", ("pipeline", "denoiser"))
def test_a_loop_that_calls_forward_is_told_at_once_and_at_the_end(way, given):
    pipeline = tiny.make()
    loop = way(pipeline)
    words = WORDS.format(type(pipeline.generator).__name__)
    plain = own_loop.last(own_loop.calls(tiny.make(), 0))
    handle = tokentrim.patch(pipeline if given == "pipeline" else pipeline.generator, POLICY)
    calls = own_loop.calls(loop, 0)
    with pytest.warns(tokentrim.TokenTrimWarning, match=words) as said:
        next(calls)
    video = own_loop.last(calls)
    assert len(said) == 1 and torch.equal(video, plain)
    with pytest.warns(tokentrim.TokenTrimWarning, match="forward of its denoiser was called directly"):
        handle.unpatch()


@each_target
def test_each_model_says_so(target):
    pipeline = target.make()
    denoiser = target.denoiser(pipeline)
    own = type(denoiser)
    past = {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
    handle = tokentrim.patch(pipeline, POLICY)
    denoiser.__class__ = type("Past" + own.__name__, (own,), past)
    with pytest.warns(tokentrim.TokenTrimWarning, match=WORDS.format("Past" + own.__name__)):
        target.run(pipeline)
    with pytest.warns(tokentrim.TokenTrimWarning, match="called directly"):
        handle.unpatch()


@each_target
def test_nothing_is_said_of_calls_that_are_seen_and_nothing_stays(target):
    """The hooks of the parts are gone behind the first call, and behind a patch that nobody has called."""
    pipeline = target.make()
    denoiser = target.denoiser(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokentrim.TokenTrimWarning)
        before = hooks_of_parts(denoiser)
        tokentrim.patch(pipeline, tokentrim.ObservePolicy()).unpatch()
        assert hooks_of_parts(denoiser) == before
        with tokentrim.patched(pipeline, tokentrim.ObservePolicy()):
            assert hooks_of_parts(denoiser) != before
            target.run(pipeline)
        with tokentrim.patched(pipeline, tokentrim.ObservePolicy()):
            target.run(pipeline)
            assert not [hook for hooks in hooks_of_parts(denoiser, Bypass) for hook in hooks]


def hooks_of_parts(denoiser, of=None):
    """Pre-hooks of each part of a denoiser, or those of them that a class has put there."""
    parts = [part for part in denoiser.modules() if part is not denoiser]
    hooks = [list(part._forward_pre_hooks.values()) for part in parts]
    return hooks if of is None else [[h for h in part if type(getattr(h, "_patches", None)) is of] for part in hooks]


def test_a_part_that_is_called_by_itself_says_nothing():
    """As a pipeline embeds its text, once, before the first call."""
    pipeline = tiny.make()
    part = next(module for module in pipeline.generator.model.modules() if isinstance(module, nn.Linear))
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokentrim.TokenTrimWarning)
        with tokentrim.patched(pipeline, POLICY) as handle:
            part(torch.zeros(1, part.in_features))
            tiny.run(pipeline)
    assert handle.report.triggers == 1


def test_copies_and_pickles_of_a_model_that_was_not_called_yet_hear_nothing():
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, POLICY), warnings.catch_warnings():
        warnings.simplefilter("error", tokentrim.TokenTrimWarning)
        for other in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
            own_loop.last(own_loop.calls(bare(other), 0))
