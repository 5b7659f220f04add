"""The undo stack: everything comes off, in any order, and nothing of somebody else's."""

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from tokentrim_hooks import Patches, UnsupportedContextError
from tokentrim_hooks.pruning.call_scope import scoped
from tokentrim_hooks.pruning.key_selection import DeadTokens
from tokentrim_hooks.pruning.tap import CallTap


class Thing:
    """Has a method to wrap."""

    def double(self, x):
        return 2 * x


def plus_one(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) + 1


def test_wrapping_a_method_leaves_the_class_alone():
    one, other, patches = Thing(), Thing(), Patches()
    patches.wrap(one, "double", plus_one)
    assert (one.double(2), other.double(2)) == (5, 4)
    patches.undo()
    assert one.double(2) == 4 and vars(one) == {}


def test_a_wrapper_that_somebody_keeps_is_inert():
    thing, patches = Thing(), Patches()
    patches.wrap(thing, "double", plus_one)
    kept = thing.double
    patches.undo()
    assert kept(2) == 4


def test_a_later_wrapper_of_somebody_else_survives():
    thing, patches = Thing(), Patches()
    patches.wrap(thing, "double", plus_one)
    inner = thing.double
    thing.double = lambda x: 10 * inner(x)
    assert thing.double(2) == 50
    patches.undo()
    assert thing.double(2) == 40, "theirs is still there, ours does nothing"


def test_a_wrapper_for_pruned_calls_stays_out_of_others():
    thing, patches = Thing(), Patches()
    patches.wrap(thing, "double", plus_one, pruned_only=True)
    tap = CallTap(None, DeadTokens(), gated=False)
    assert thing.double(2) == 4
    with scoped(None):
        assert thing.double(2) == 4, "nothing is dead in this call"
    with scoped(tap):
        assert thing.double(2) == 5
        with scoped(None):
            assert thing.double(2) == 4, "another pipeline's call, made inside"
    assert thing.double(2) == 4


def test_undo_goes_on_after_a_failure_and_tells():
    done, patches = [], Patches()

    def fail():
        raise OSError("cannot undo this")

    for action in (lambda: done.append(1), fail, lambda: done.append(3)):
        patches.on_undo(action)
    with pytest.raises(OSError, match="cannot undo"):
        patches.undo()
    assert done == [3, 1], "last first, to the end"
    patches.undo()


def test_hooks_of_copies_and_pickles_are_inert():
    module, calls, patches = nn.Linear(2, 2), [], Patches()
    patches.hook(module, before=lambda *_: calls.append(1), after=lambda *_: calls.append(2))
    shallow, deep, pickled = copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for twin in (shallow, deep, pickled):
        twin(torch.zeros(1, 2))
    assert calls == []
    module(torch.zeros(1, 2))
    assert calls == [1, 2]
    patches.undo()
    module(torch.zeros(1, 2))
    assert calls == [1, 2] and not module._forward_hooks and not module._forward_pre_hooks


def attention_module(name="an_attention_module"):
    module = types.ModuleType(name)

    def attention(q, k, v, lengths=None):
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)

    module.attention = attention
    sys.modules[name] = module
    return module


def marked():
    q, k, v = (torch.randn(1, n, 1, 4) for n in (2, 5, 5))
    v[0, 3, 0, 0] = float("inf")
    return q, k, v


def test_a_tap_is_shared_and_goes_with_its_last_user():
    module = attention_module()
    original, first, second = module.attention, Patches(), Patches()
    first.tap(module, "attention")
    tapped = module.attention
    second.tap(module, "attention")
    assert module.attention is tapped is not original
    first.undo()
    assert module.attention is tapped
    second.undo()
    assert module.attention is original


def test_a_tap_filters_only_inside_a_patched_call():
    module, patches = attention_module(), Patches()
    patches.tap(module, "attention")
    q, k, v = marked()
    assert not torch.isfinite(module.attention(q, k, v)).all(), "outside a call it does nothing"
    with scoped(CallTap(None, DeadTokens())):
        filtered = module.attention(q, k=k, v=v)
    patches.undo()
    live = [0, 1, 2, 4]
    torch.testing.assert_close(filtered, module.attention(q, k[:, live], v[:, live]), rtol=0, atol=0)


def test_a_tap_refuses_what_it_cannot_do_exactly():
    module, patches = attention_module(), Patches()
    patches.tap(module, "attention", refuse=("lengths",))
    with scoped(CallTap(None, DeadTokens())), pytest.raises(UnsupportedContextError, match="lengths"):
        module.attention(*marked(), lengths=[5])
    patches.undo()
