"""A fingerprint sees every way in which a patch could stay behind."""

import functools

import pytest
import tiny_reference as tiny
import torch

from tokentrim_hooks.reference import model as code
from tokentrim_hooks.testing import assert_same, fingerprint


def wrap_function(pipeline, undo):
    original = code.attention
    undo.append(lambda: setattr(code, "attention", original))
    code.attention = lambda q, k, v: original(q, k, v)


def patch_class(pipeline, undo):
    kind = type(pipeline.generator.model.blocks[0])
    original = kind.forward
    undo.append(lambda: setattr(kind, "forward", original))
    kind.forward = lambda self, *a, **k: original(self, *a, **k)


def patch_torch(pipeline, undo):
    original = torch.nn.functional.scaled_dot_product_attention
    undo.append(lambda: setattr(torch.nn.functional, "scaled_dot_product_attention", original))
    torch.nn.functional.scaled_dot_product_attention = lambda *a, **k: original(*a, **k)


def weight(pipeline):
    return pipeline.generator.model.head.weight


CHANGES = {
    "a hook": lambda p, undo: p.generator.model.blocks[1].self_attn.register_forward_hook(lambda *_: None),
    "an attribute of a module": lambda p, undo: setattr(p.generator.model, "counter", 1),
    "an attribute of the pipeline": lambda p, undo: setattr(p, "_tokentrim", None),
    "a method on the scheduler": lambda p, undo: setattr(p.scheduler, "add_noise", p.scheduler.add_noise),
    "another class": lambda p, undo: setattr(p.generator.model, "__class__", type("X", (code.CausalVideoModel,), {})),
    "another module": lambda p, undo: setattr(p.generator.model, "head", torch.nn.Linear(16, 48)),
    "a written weight": lambda p, undo: p.generator.model.head.weight.add_(0),
    "a moved weight": lambda p, undo: setattr(weight(p), "data", weight(p).clone()),
    "a function of the module": wrap_function,
    "a method of the class": patch_class,
    "torch's attention": patch_torch,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_are_seen(change):
    pipeline, undo = tiny.make(), []
    before = fingerprint(pipeline)
    assert_same(before, fingerprint(pipeline))
    change(pipeline, undo)
    try:
        with pytest.raises(AssertionError, match="not as it was"):
            assert_same(before, fingerprint(pipeline))
    finally:
        for action in undo:
            action()


def test_what_the_model_changes_itself_can_be_ignored_but_code_cannot():
    pipeline = tiny.make()
    before = fingerprint(pipeline)
    tiny.run(pipeline)
    own = before.changed(fingerprint(pipeline))
    assert own == {"ReferencePipeline.kv_cache1", "ReferencePipeline.crossattn_cache"}
    assert_same(before, fingerprint(pipeline), ignore=own)
    pipeline.kv_cache1 = print
    with pytest.raises(AssertionError, match="kv_cache1"):
        assert_same(before, fingerprint(pipeline), ignore=own)


class Curve:
    """Data that can be called, as numpy's ``poly1d`` is."""

    def __call__(self, x):
        return x


def test_data_that_can_be_called_is_ignored_where_the_model_makes_it_anew_but_a_wrapper_of_it_is_not():
    pipeline = tiny.make()
    pipeline.curve = Curve()
    before = fingerprint(pipeline)
    pipeline.curve = Curve()
    own = before.changed(fingerprint(pipeline))
    assert own == {"ReferencePipeline.curve"}
    assert_same(before, fingerprint(pipeline), ignore=own)
    with pytest.raises(AssertionError, match="curve"):
        assert_same(before, fingerprint(pipeline))
    pipeline.curve = functools.partial(pipeline.curve)
    with pytest.raises(AssertionError, match="curve"):
        assert_same(before, fingerprint(pipeline), ignore=own)


def test_a_function_that_the_model_makes_anew_is_never_ignored():
    pipeline = tiny.make()
    pipeline.curve = lambda x: x
    before = fingerprint(pipeline)
    pipeline.curve = lambda x: x
    with pytest.raises(AssertionError, match="curve"):
        assert_same(before, fingerprint(pipeline), ignore=before.changed(fingerprint(pipeline)))
