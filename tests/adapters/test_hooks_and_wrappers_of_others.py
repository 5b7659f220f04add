"""Hooks of others run once per call, also where it is replayed; their wrappers around forward hide no argument."""

from __future__ import annotations

import functools
import types

import helios_tiny
import pytest
import torch
from targets import TARGETS, each_target
from torch import nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
SCALE = 0.9


def scaled(output):
    """The tensors of an output; a cache beside them stays what it is."""
    if torch.is_tensor(output):
        return output * SCALE
    if isinstance(output, tuple):
        return tuple(part * SCALE if torch.is_tensor(part) else part for part in output)
    return type(output)({key: value * SCALE for key, value in output.items()})


def scaled_input(kwargs):
    name = "noisy_image_or_video" if "noisy_image_or_video" in kwargs else "hidden_states"
    return {**kwargs, name: kwargs[name] * SCALE}


def build_in(denoiser, kind):
    """The same as the hook, inside forward: what a hook of any kind amounts to."""
    inner = denoiser.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **scaled_input(kwargs)) if kind == "pre" else scaled(inner(*args, **kwargs))

    denoiser.forward = forward


def hook_on(denoiser, kind, prepend):
    if kind == "pre":
        denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: (args, scaled_input(kwargs)), with_kwargs=True, prepend=prepend
        )
    else:
        denoiser.register_forward_hook(lambda module, args, output: scaled(output), prepend=prepend)


@each_target
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_is_applied_once_to_a_replay(target, kind):
    expected = target.make()
    build_in(target.denoiser(expected), kind)
    with tokentrim.patched(expected, POLICY):
        right = target.run(expected)
    for prepend in (False, True):
        pipeline = target.make()
        with tokentrim.patched(pipeline, POLICY) as handle:
            hook_on(target.denoiser(pipeline), kind, prepend)
            torch.testing.assert_close(target.run(pipeline), right, rtol=0, atol=1e-5)
            assert handle.report.triggers


def scale_in_place(module, args, kwargs):
    next(part for name, part in kwargs.items() if name in ("noisy_image_or_video", "hidden_states")).mul_(SCALE)


@each_target
def test_a_hook_that_writes_into_what_it_is_given_is_named(target):
    """A call made again is given what the first has left: nobody can undo that, so it is said, and what it comes of."""
    plain, pipeline = target.make(), target.make()
    target.denoiser(plain).register_forward_pre_hook(scale_in_place, with_kwargs=True)
    target.denoiser(pipeline).register_forward_pre_hook(scale_in_place, with_kwargs=True)
    words = r"argument (noisy_image_or_video|hidden_states) in place, by hook scale_in_place: .*\nReturn a new tensor"
    with tokentrim.patched(pipeline, POLICY), pytest.raises(tokentrim.UnsupportedContextError, match=words):
        target.run(pipeline)
    with tokentrim.patched(pipeline, POLICY, on_error="warn"), pytest.warns(tokentrim.TokenTrimWarning, match=words):
        assert torch.equal(target.run(pipeline), target.run(plain))


def test_a_hook_that_writes_in_place_and_comes_once_a_prune_was_proved():
    target = TARGETS[0]
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY):
        target.run(pipeline)
        target.denoiser(pipeline).register_forward_pre_hook(scale_in_place, with_kwargs=True)
        with pytest.raises(tokentrim.UnsupportedContextError, match=r"in place.*scale_in_place"):
            target.run(pipeline)


def wrapped_and_bound(denoiser):
    """functools.wraps on a function with self, bound with __get__: inspect drops the first real parameter."""
    inner = denoiser.forward

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        return inner(*args, **kwargs)

    denoiser.forward = forward.__get__(denoiser)


def wrapped_unbound(denoiser):
    """functools.wraps of the class's forward on a plain function: inspect sees self as a parameter."""
    inner = type(denoiser).forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(denoiser, *args, **kwargs)

    denoiser.forward = forward


def bare(denoiser):
    inner = denoiser.forward
    denoiser.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def bare_method(denoiser):
    inner = denoiser.forward
    denoiser.forward = types.MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), denoiser)


@pytest.fixture(scope="module")
def pruned():
    videos = {}
    for target in TARGETS:
        pipeline = target.make()
        with tokentrim.patched(pipeline, POLICY):
            videos[target.name] = target.run(pipeline)
    return videos


@each_target
@pytest.mark.parametrize("wrap", [wrapped_and_bound, wrapped_unbound, bare, bare_method])
def test_a_wrapper_around_forward_hides_no_argument(target, wrap, pruned):
    before, after = target.make(), target.make()
    wrap(target.denoiser(before))
    with tokentrim.patched(before, POLICY):
        assert torch.equal(target.run(before), pruned[target.name]), "wrapped, then patched"
    with tokentrim.patched(after, POLICY):
        wrap(target.denoiser(after))
        assert torch.equal(target.run(after), pruned[target.name]), "patched, then wrapped"


@each_target
def test_a_subclass_whose_forward_names_nothing(target, pruned):
    """What it takes is read from the class that says so; it was a KeyError."""
    pipeline = target.make()
    kind = type(target.denoiser(pipeline))

    def forward(self, *args, **kwargs):
        return kind.forward(self, *args, **kwargs)

    target.denoiser(pipeline).__class__ = type("Passing", (kind,), {"forward": forward})
    with tokentrim.patched(pipeline, POLICY):
        assert torch.equal(target.run(pipeline), pruned[target.name])


def test_helios_without_indices_is_refused():
    pipeline = helios_tiny.modular()
    inner = pipeline.transformer.forward
    pipeline.transformer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    refusal = pytest.raises(tokentrim.UnsupportedContextError, match=r"indices_hidden_states.*pass them\.\n")
    with tokentrim.patched(pipeline, POLICY), refusal:
        helios_tiny.run_modular(pipeline)


class Holder:
    def __init__(self, generator):
        self.generator = generator


def test_a_compiled_or_wrapped_model_is_refused_by_what_it_is():
    target = TARGETS[0]
    generator = target.denoiser(target.make())
    with pytest.raises(tokentrim.CompiledModelError, match=r"\.generator is a OptimizedModule.*torch\.compile"):
        tokentrim.patch(Holder(torch.compile(generator, backend="eager")))
    with pytest.raises(tokentrim.UnsupportedModelError, match=r"\.generator is wrapped in DataParallel.*inside"):
        tokentrim.patch(Holder(nn.DataParallel(generator)))


class Through(nn.Module):
    """A wrapper as engines and offloaders write it: it shows what is inside, and takes whatever it is given."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@each_target
def test_a_wrapper_that_shows_what_is_inside(target, pruned):
    """Wrapped before, it is refused as wrapped: what its forward takes could not be told. Wrapped later, it works."""
    before, after = target.make(), target.make()
    setattr(before, target.part, Through(target.denoiser(before)))
    with pytest.raises(tokentrim.UnsupportedModelError, match=rf"\.{target.part} is wrapped in Through.*inside"):
        tokentrim.patch(before)
    with tokentrim.patched(after, POLICY):
        setattr(after, target.part, Through(target.denoiser(after)))
        assert torch.equal(target.run(after), pruned[target.name])
