"""Looking into a model of somebody else: layers, homes, signatures, the noise schedule."""

import inspect
import sys
from abc import ABC
from types import SimpleNamespace
from typing import Generic, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks import bind, home_of, lacks, layers_of, nearest_sigma, parameters_of
from tokentrim_hooks.patching.callers import is_driven_by


class Block(nn.Module):
    def __init__(self, attention=True):
        super().__init__()
        self.attention = nn.Identity() if attention else None


def attend(q, k, v, *, mask=None):
    return v


def test_layers_come_in_order_and_blocks_without_one_are_left_out():
    model = SimpleNamespace(net=SimpleNamespace(blocks=nn.ModuleList([Block(), Block(False), Block()])))
    assert layers_of(model, "net.blocks", "attention") == [model.net.blocks[i].attention for i in (0, 2)]
    for path, name in (("net.blocks", "attn1"), ("net.layers", "attention"), ("other.blocks", "attention")):
        assert layers_of(model, path, name) == []
    assert layers_of(None, "blocks", "attention") == []


@pytest.mark.parametrize("thing", [Block(), Block, attend])
def test_home_of_an_object_a_class_or_a_function(thing):
    assert home_of(thing) is home_of(thing, "attend") is sys.modules[__name__]
    assert home_of(thing, "attend_not") is None and home_of(thing, "__doc__") is None


def test_what_lives_nowhere_has_no_home():
    assert home_of(None) is home_of(SimpleNamespace(), "attend") is None


def test_a_signature_lacks_names_in_words():
    assert parameters_of(attend) == ("q", "k", "v", "mask")
    assert lacks(attend, ("k", "mask"), "attention") == ""
    assert lacks(attend, ("k", "bias", "q", "scale"), "attention") == "attention lacks bias, scale"
    assert lacks(None, ("k",), "prepare()") == "prepare() lacks k" and parameters_of(None) == ()


def test_bind_gives_defaults_and_the_owner_of_a_method():
    assert bind(attend, (1, 2), {"v": 3}) == {"q": 1, "k": 2, "v": 3, "mask": None}
    block = Block()
    assert bind(block.register_buffer, ("name", None), {}) == {
        "self": block, "name": "name", "tensor": None, "persistent": True,
    }  # fmt: skip


def test_nearest_sigma_is_the_table_s_own():
    table = SimpleNamespace(timesteps=torch.tensor([1000.0, 937.5, 600.25]), sigmas=torch.tensor([1.0, 0.9, 0.6, 0.0]))
    rounded = torch.tensor([[937, 600], [1000, 3]])
    assert torch.equal(nearest_sigma(table, rounded), torch.tensor([[0.9, 0.6], [1.0, 0.6]]))
    assert nearest_sigma(table, torch.tensor(990.0)).shape == ()


@pytest.mark.parametrize("kind", [tokentrim.Adapter, tokentrim.Adapter[tokentrim.Call]])
def test_an_adapter_may_say_its_kind_of_call_or_not(kind):
    class Mine(kind):
        name = "mine"

    assert issubclass(Mine, tokentrim.Adapter) and Mine.carry is tokentrim.Adapter.carry


def test_two_bare_modules_have_signatures_of_their_own():
    first, second = nn.Module(), nn.Module()
    first.forward = lambda x: x
    second.forward = lambda y, z=1: y
    assert bind(first, (1,), {}) == {"x": 1}
    assert bind(second, (1,), {}) == {"y": 1, "z": 1}


CALLABLES = (
    attend,
    lambda a, b=2: None,
    lambda a, /, b, *, c=3: None,
    lambda a, *rest, b=1, **more: None,
    lambda self, args=1: None,
    lambda: None,
)


NAMED = st.dictionaries(st.sampled_from(("a", "b", "c", "q", "k", "v", "mask", "self", "args")), st.none())


@given(st.sampled_from(CALLABLES), st.lists(st.integers(), max_size=5), NAMED)
def test_bind_is_what_pythons_own_signatures_say(function, args, kwargs):
    """The same arguments in the same order, and what does not fit is refused in Python's own words."""

    def bound(by):
        try:
            return list(by().items())
        except TypeError as refusal:
            return str(refusal)

    def by_python():
        found = inspect.signature(function).bind(*args, **kwargs)
        found.apply_defaults()
        return found.arguments

    assert bound(lambda: bind(function, tuple(args), kwargs)) == bound(by_python)


@pytest.mark.parametrize("general", [ABC, Generic[TypeVar("T")], nn.Module])
def test_a_caller_that_has_only_general_classes_in_common_drives_no_call_of_its_own(general):
    """A trainer, a node of a test runner: what stands around the user's loop is no second pipeline."""

    class Stage(general):
        pass

    class Runner(general):
        def run(self, stage):
            return is_driven_by(stage, stage.transformer)

    stage = Stage()
    stage.__dict__["transformer"] = Block()
    assert Runner().run(stage)
    assert not type("Twin", (Stage,), {"run": Runner.run})().run(stage)


def test_a_forward_that_names_nothing_is_read_by_its_base_only_if_it_calls_it():
    """FastVideo's hands all on to methods of its own, while its abstract base names what nobody is given."""

    class Abstract(nn.Module):
        def forward(self, hidden_states): ...

    class Passing(Abstract):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class HandingOn(Abstract):
        def forward(self, *args, **kwargs):
            return self.inferred(*args, **kwargs)

    assert parameters_of(Passing()) == ("hidden_states",)
    assert parameters_of(HandingOn()) == ("args", "kwargs")
