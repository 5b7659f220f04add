"""A patch that does nothing says so: the denoiser was replaced after it, never called, only by others, never judged."""

from __future__ import annotations

import copy
import itertools
import re
import warnings

import pytest
import tiny_reference as tiny
import torch
from targets import TARGETS, each_target
from torch import nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks.handle import handle as handles
from tokentrim_hooks.testing import ForcedPolicy
from tokentrim_hooks.testing.checks import assert_raises

POLICY = ForcedPolicy({2: [0, 3]})
DIFFUSERS = TARGETS[1:]


def another(target, pipeline):
    return target.denoiser(target.make())


def deep_copy(target, pipeline):
    return copy.deepcopy(target.denoiser(pipeline))


def twin(target, pipeline):
    """As InvokeAI's apply_custom_layers_to_model: an object of a subclass, with the same ``__dict__``."""
    old = target.denoiser(pipeline)
    new = object.__new__(type("Custom" + type(old).__name__, (type(old),), {}))
    new.__dict__ = old.__dict__
    return new


WORDS = {
    another: r"was replaced after the patch by another \w+\. .*Patch again",
    deep_copy: r"was replaced after the patch by a copy, and copies carry no patch\. .*Patch again",
    twin: r"by a Custom\w+ that shares its attributes \(its class was swapped\)\. .*Patch again",
}


def put(target, pipeline, denoiser):
    setattr(pipeline, target.part, denoiser)


def said(action):
    """The warnings of ours that an action gives."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in seen if issubclass(w.category, tokentrim.TokenTrimWarning)]


@each_target
@pytest.mark.parametrize("new", WORDS, ids=lambda new: new.__name__)
def test_a_denoiser_that_was_replaced_is_told_at_the_first_chance_and_at_the_end(target, new):
    for chance, again in ((lambda h: h.report, True), (lambda h: h.reset(), True), (lambda h: h.unpatch(), False)):
        pipeline = target.make()
        handle = tokentrim.patch(pipeline, POLICY)
        put(target, pipeline, new(target, pipeline))
        words = said(lambda chance=chance, handle=handle: chance(handle))
        assert len(words) == 1 and re.search(WORDS[new], words[0]), words
        assert target.part in words[0]
        assert not said(lambda handle=handle: handle.report), "once while the patch is on"
        assert said(handle.unpatch) == (words if again else []), "and once at its end"


@each_target
def test_what_the_words_advise_works(target):
    right = target.make()
    with tokentrim.patched(right, POLICY):
        expected = target.run(right)
    pipeline = target.make()
    tokentrim.patch(pipeline, POLICY)
    put(target, pipeline, deep_copy(target, pipeline))
    with tokentrim.patch(pipeline, POLICY, replace=True) as handle:
        assert torch.equal(target.run(pipeline), expected) and handle.report.triggers


class Around(nn.Module):
    """As DistributedDataParallel: calls still arrive at what is inside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@each_target
def test_what_still_works_is_no_replacement(target):
    """A wrapper, a class derived in place (FSDP2), and a denoiser that is given away after the run."""
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        denoiser = target.denoiser(pipeline)
        own = type(denoiser)
        denoiser.__class__ = type("FSDP" + own.__name__, (own,), {})
        target.run(pipeline)
        assert handle.report.triggers
        put(target, pipeline, Around(denoiser))
        assert handle.report.triggers
        put(target, pipeline, None)
        assert handle.report.triggers


def test_a_class_changed_to_a_stranger():
    pipeline = tiny.make()
    handle = tokentrim.patch(pipeline, POLICY)
    own = type(pipeline.generator)
    stranger = type("Stranger", own.__bases__, {k: v for k, v in vars(own).items() if not k.startswith("__")})
    pipeline.generator.__class__ = stranger
    with pytest.warns(tokentrim.TokenTrimWarning, match=rf"class of .* from {own.__name__} to Stranger.*Patch again"):
        handle.unpatch()


@each_target
def test_a_shallow_copy_is_not_patched(target):
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY):
        other = copy.copy(pipeline)
        assert tokentrim.is_patched(pipeline) and not tokentrim.is_patched(other)
        assert tokentrim.is_patched(target.denoiser(pipeline))
        assert not tokentrim.is_patched(copy.copy(target.denoiser(pipeline)))
        tokentrim.unpatch(other)
        assert tokentrim.is_patched(pipeline)


@pytest.mark.parametrize("target", DIFFUSERS, ids=lambda target: target.name)
def test_only_others_called(target):
    pipeline = target.make()
    handle = tokentrim.patch(pipeline, POLICY)
    target.run(copy.copy(pipeline))
    (words,) = said(handle.unpatch)
    assert re.search(
        r"all \d+ calls of the denoiser came from another pipeline .* Patch the pipeline that you run", words
    )


@pytest.mark.parametrize("target", DIFFUSERS, ids=lambda target: target.name)
def test_a_pipeline_that_shares_only_the_scheduler_is_not_taken_for_a_run(target):
    """The patched pipeline was not run, and the words do not say that it was."""
    pipeline, other = target.make(), target.make()
    if not hasattr(pipeline, "scheduler"):
        pytest.skip("NOT CHECKED: it has no scheduler to share")
    pipeline.scheduler = other.scheduler
    handle = tokentrim.patch(pipeline, POLICY)
    target.run(other)
    for words in said(handle.unpatch):
        assert "although the model, or another that shares its scheduler, was run" in words


@each_target
def test_a_patch_that_comes_off_unused_or_after_a_failure_says_nothing(target):
    pipeline = target.make()
    assert not said(lambda: tokentrim.patch(pipeline, POLICY).unpatch())
    handle = tokentrim.patch(pipeline, POLICY)
    put(target, pipeline, another(target, pipeline))
    assert not said(lambda: tokentrim.patch(pipeline, POLICY, replace=True).unpatch())
    assert not handle.active
    with pytest.raises(ZeroDivisionError), tokentrim.patched(pipeline, POLICY):
        pipeline.touched = True
        raise ZeroDivisionError


def test_never_judged():
    """Three runs of one chunk each: the calls say that each is a video of its own."""
    pipeline = tiny.make()
    handle = tokentrim.patch(pipeline, POLICY)
    for _ in range(2):
        assert not said(lambda: tiny.run(pipeline, chunks=1))
    assert len(handle.report) == 2
    words = "3 chunks and judged none: every one opened a new video"
    with pytest.warns(tokentrim.TokenTrimWarning, match=words):
        tiny.run(pipeline, chunks=1)
    assert not said(lambda: tiny.run(pipeline, chunks=1)), "once while the patch is on"
    with pytest.warns(tokentrim.TokenTrimWarning, match=words.replace("3", "4")):
        handle.unpatch()


def test_never_judged_is_said_amid_the_run_that_shows_it():
    """An adapter's model whose every call opens a video: what it makes is one video to its user."""
    pipeline = tiny.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tokentrim.TokenTrimWarning)
        with tokentrim.patched(pipeline, POLICY) as handle:
            handle.adapter.restarts = lambda call, seen: True
            heard = []
            warnings.showwarning = lambda message, *_: heard.append((str(message), len(handle.report)))
            warnings.simplefilter("always", tokentrim.TokenTrimWarning)
            tiny.run(pipeline)
            warnings.simplefilter("ignore", tokentrim.TokenTrimWarning)
    assert len(heard) == 1 and "every one opened a new video" in heard[0][0] and heard[0][1] == 3
    assert len(handle.report) == 5


@pytest.mark.parametrize(("at", "chunks"), [(2, 1), (5, 1), (6, 2)])
def test_never_judged_says_nothing_of_videos_that_were_broken_off(at, chunks):
    """Ctrl-C in a first chunk of which calls had come back, or right behind it: no sign that a call opens a video."""
    pipeline, count = tiny.make(), itertools.count(1)

    def interrupt(*_):
        if next(count) % at == 0:
            raise KeyboardInterrupt

    pipeline.generator.register_forward_pre_hook(interrupt)
    handle = tokentrim.patch(pipeline, POLICY)
    for _ in range(4):
        assert not said(lambda: assert_raises(KeyboardInterrupt, lambda: tiny.run(pipeline)))
    assert not said(handle.unpatch)
    records = handle.report.records
    assert [record.chunk for record in records] == [*range(chunks)] * 4
    assert all(bool(record.notes) == (record.chunk == chunks - 1) for record in records)


def test_never_judged_says_nothing_of_a_video_that_was_judged():
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, POLICY):
        for _ in range(3):
            tiny.run(pipeline, chunks=2)
        assert not said(lambda: [tiny.run(pipeline, chunks=1) for _ in range(4)])


def test_never_judged_is_no_news_of_a_policy_that_does_not_judge():
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, tokentrim.Policy()):
        tiny.run(pipeline)


def test_the_report_is_looked_through_once_for_each_chunk(monkeypatch):
    """Not at every hook: of the calls of a chunk, and of chunks behind the first judged one, none costs anything."""
    looked = []
    monkeypatch.setattr(handles, "never_judged", lambda report, _=0: looked.append(len(report)) or "")
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, tokentrim.DriftPolicy()) as handle:
        tiny.run(pipeline, chunks=6)
        assert looked == [1] and len(handle.report) == 6
