"""What an author gets wrong is told at once, with the names of the adapter and of the method."""

import dataclasses
import types

import pytest
import tiny_reference as tiny
import torch
import torch.nn.functional as F
from tokentrim_hooks_adapters.self_forcing import SelfForcing

import tokentrim_hooks as tokentrim
from tokentrim_hooks import CacheRows, KeyLayout, Patches
from tokentrim_hooks.pruning.fleeting import FleetingMarks
from tokentrim_hooks.pruning.key_selection import QueryGroup
from tokentrim_hooks.pruning.live_keys import attend_live, live_keys
from tokentrim_hooks.pruning.tombstones import Tombstones, alive_rows
from tokentrim_hooks.testing import ForcedPolicy


def attend(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [
        ("parse", 3, "a Call, or None"),
        ("context", None, "CacheRows or a KeyLayout"),
        ("phase", None, "a Phase"),
        ("prediction", "x0", "x0 as a tensor"),
        ("prediction", torch.zeros(1, 2), "x0 of shape"),
        ("identity", 3, "a tuple"),
    ],
)
def test_a_wrong_answer_names_adapter_and_method(method, answer, words):
    wrong = type("Wrong", (SelfForcing,), {"name": "wrong", method: lambda self, *_: answer})
    pipeline = tiny.make()
    with (
        pytest.raises(tokentrim.PluginError, match=rf"adapter 'wrong': {method}\(\) returned(.|\n)*{words}"),
        tokentrim.patched(pipeline, ForcedPolicy({2: (0,)}), adapter=wrong),
    ):
        tiny.run(pipeline)


def context(**changes):
    """A ``context`` of which some attributes are other ones, given the right answer."""
    return "context", lambda self, call: dataclasses.replace(
        rows := SelfForcing.context(self, call), **{name: change(rows) for name, change in changes.items()}
    )


def parse(**changes):
    return "parse", lambda self, arguments: dataclasses.replace(SelfForcing.parse(self, arguments), **changes)


@pytest.mark.parametrize(
    ("method", "wrong", "words"),
    [
        (*context(values=lambda rows: []), r"values=\[\] with history in rows 0 to \d+(.|\n)*of every layer"),
        (*context(values=lambda rows: [], stop=lambda rows: 0), "2 keys beside 0 values"),
        (*context(keys=lambda rows: rows.keys[:1]), "1 keys beside 2 values"),
        (*context(values=lambda rows: None), "values of type NoneType"),
        (*context(values=lambda rows: rows.values[0]), "values of type Tensor(.|\n)*one per layer"),
        (*context(values=lambda rows: [{"v": v} for v in rows.values]), "hold a dict(.|\n)*V tensors themselves"),
        (*context(values=lambda rows: [v.flatten(2) for v in rows.values]), r"\(1, 24, 16\)(.|\n)*\[B, rows, heads"),
        (*context(stop=lambda rows: rows.stop + 99), r"stop=\d+ for values of 24 rows"),
        (*context(stop=lambda rows: torch.tensor(rows.stop)), "stop=tensor(.|\n)*ints counted on the host"),
        (*context(start=lambda rows: rows.stop + 1), "0 <= start <= stop"),
        (*context(anchors=lambda rows: -1), "no negative anchors"),
        ("context", lambda self, call: KeyLayout(()), "KeyLayout of no segments"),
        ("context", lambda self, call: KeyLayout(("history",)), "a tuple of Segment"),
        (*parse(latents=torch.zeros(1, 0, 3, 8, 8)), r"\[B, F, C, H, W\]"),
        (*parse(start=None), "start=None(.|\n)*start as an int"),
        (*parse(start=torch.tensor(0)), "start as an int, counted on the host"),
        (*parse(timestep=0.5), "timestep as a tensor"),
        (*parse(commits=torch.tensor(False)), "True, False or None"),
        (*parse(stream={}), "stream of type dict(.|\n)*a tensor of the cache"),
        ("identity", lambda self, arguments: ([],), "a list or dict(.|\n)*a tensor of the cache"),
        ("in_flight", lambda self, call, output: "x0", "a chunk like call.latents"),
        ("accepted", lambda self, call: torch.zeros(1, 2), r"\(1, 2\)(.|\n)*a chunk like call.latents"),
        ("restarts", lambda self, call, seen: None, "None(.|\n)*True or False"),
        ("restarts", lambda self, call, seen: torch.tensor(False), "True or False, told on the host"),
        ("replay", lambda self, denoiser, args, kwargs: None, "None(.|\n)*what the denoiser returned"),
        ("carry", lambda self, *_: None, "None(.|\n)*latents of shape"),
        ("carry_step", lambda self, *_: torch.zeros(2), r"\(2,\)(.|\n)*latents of shape"),
        ("with_latents", lambda self, call, args, kwargs, latents: kwargs, "a pair: the positional arguments"),
    ],
)
def test_empty_lists_and_wrong_lengths_are_told_in_words(method, wrong, words):
    adapter, pipeline = type("Wrong", (SelfForcing,), {"name": "wrong", method: wrong}), tiny.make()
    with (
        pytest.raises(tokentrim.PluginError, match=rf"adapter 'wrong': {method}\(\) returned(.|\n)*{words}"),
        tokentrim.patched(pipeline, ForcedPolicy({2: (0,)}), adapter=adapter, probe="candidate"),
    ):
        tiny.run(pipeline)


@pytest.mark.parametrize("wrong", [lambda rows: [v.clone() for v in rows.values], lambda rows: list(rows.keys)])
def test_a_copy_of_v_or_k_in_its_place_is_told(wrong):
    adapter = type("Wrong", (SelfForcing,), {"name": "wrong", **dict([context(values=wrong)])})
    pipeline = tiny.make()
    with (
        pytest.warns(tokentrim.TokenTrimWarning, match="neither a copy nor K"),
        tokentrim.patched(pipeline, ForcedPolicy({2: (0,)}), adapter=adapter),
    ):
        tiny.run(pipeline)


@pytest.mark.parametrize(("method", "more"), [("prediction", ()), ("with_prediction", (torch.zeros(1),))])
def test_an_output_that_is_no_tensor_and_no_tuple_is_named(method, more):
    with pytest.raises(tokentrim.PluginError, match=rf"returns a dict(.|\n)*Write {method}\(\)"):
        getattr(tokentrim.Adapter, method)(SelfForcing(), None, {"clean": 1}, *more)


def test_a_grid_that_is_not_the_rows_is_refused_with_both():
    wrong = type("Wrong", (SelfForcing,), dict([context(rows_per_frame=lambda rows: rows.rows_per_frame // 2)]))
    pipeline = tiny.make()
    with (
        pytest.raises(tokentrim.UnsupportedContextError, match=r"grid is \d+ x \d+ tokens(.|\n)*rows_per_frame="),
        tokentrim.patched(pipeline, ForcedPolicy({2: (0,)}), adapter=wrong),
    ):
        tiny.run(pipeline)


def test_an_adapter_is_given_as_a_class():
    own = type("Own", (SelfForcing,), {"name": "not installed"})
    with tokentrim.patched(tiny.make(), tokentrim.ObservePolicy(), adapter=own) as handle:
        assert handle.adapter.name == "not installed"
    with pytest.raises(tokentrim.PluginError, match="must be one of the Adapter subclasses"):
        tokentrim.patch(tiny.make(), adapter=dict)


def test_the_old_name_of_in_flight_is_refused():
    old = type("Old", (SelfForcing,), {"reference": lambda self, call, output: None})
    with pytest.raises(tokentrim.PluginError, match="called in_flight"):
        tokentrim.patch(tiny.make(), adapter=old)


def namespace():
    return types.SimpleNamespace(__name__="model", attend=attend)


def test_a_tap_checks_its_names_when_it_attaches():
    with pytest.raises(tokentrim.AttachError, match=r"model.attend\(\) takes \(q, k, v\)(.|\n)*mask='bias'"):
        Patches().tap(namespace(), "attend", mask="bias")
    with pytest.raises(tokentrim.AttachError, match="no function 'attention'"):
        Patches().tap(namespace(), "attention")


def test_a_second_tap_shares_its_names_and_adds_what_it_refuses():
    model, patches = namespace(), Patches()
    patches.tap(model, "attend")
    patches.tap(model, "attend", refuse=("q",))
    with pytest.raises(tokentrim.AttachError, match="tapped already, with other options"):
        patches.tap(model, "attend", heads_first=True)
    patches.undo()
    assert model.attend is attend


def test_torchs_own_kernel_is_tapped_without_names():
    kernel, patches = F.scaled_dot_product_attention, Patches()
    patches.tap(F, "scaled_dot_product_attention")
    assert F.scaled_dot_product_attention is not kernel
    q = torch.ones(1, 2, 3, 4)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), q)
    patches.undo()
    assert F.scaled_dot_product_attention is kernel


def test_what_is_written_in_c_and_unknown_is_refused_in_words():
    with pytest.raises(tokentrim.AttachError, match="no function of Python"):
        Patches().tap(types.SimpleNamespace(f=torch._C._nn.gelu), "f")


def test_samples_with_equal_masks_share_a_launch():
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 4, 2, 8) for _ in range(3))
    alive = torch.ones(6, 4, dtype=torch.bool)
    alive[[1, 4], 2] = alive[3, 0] = False
    launches = []

    def counted(q, k, v, mask):
        launches.append(len(q))
        return attend(q, k, v)

    actual = attend_live(counted, q, k, v, None, live_keys([QueryGroup(0, None, alive)], torch.device("cpu")))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=alive[:, None, None].expand(-1, 1, 4, -1)
    )
    assert sorted(launches) == [1, 2, 3]
    torch.testing.assert_close(actual, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("spoilt", "copied"), [((0,), [True, False]), ((2,), [True, True]), ((0, 1, 2), [True, False])]
)
def test_neighbours_that_keep_every_key_are_not_copied(spoilt, copied):
    """One flagged sample must not cost a copy of the K and V of all others; those that lie apart are gathered."""
    q, k, v = (torch.randn(5, 4, 2, 8) for _ in range(3))
    alive = torch.ones(5, 4, dtype=torch.bool)
    alive[list(spoilt), 2] = False
    found = {}

    def noted(q, some_k, some_v, mask):
        found[some_k.shape[1]] = some_k.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
        return attend(q, some_k, some_v)

    actual = attend_live(noted, q, k, v, None, live_keys([QueryGroup(0, None, alive)], torch.device("cpu")))
    assert [found[3], found[4]] == copied
    for sample, keys in enumerate(alive):
        own = [x[sample : sample + 1] for x in (q, k[:, keys], v[:, keys])]
        torch.testing.assert_close(actual[sample : sample + 1], attend(*own))


def test_a_view_by_frames_marks_the_sites_of_the_folded_batch():
    folded = torch.ones(2 * 3, 4, 1, 5)  # [B * sites, frames, heads, width]
    view = folded.unflatten(0, (2, 3)).transpose(1, 2)
    marks = Tombstones()
    assert marks.mark(CacheRows([view], 3, 12, 3), [[1], [0, 2]]) == 3 + 6
    dead = (~alive_rows(folded)).nonzero().tolist()
    assert dead == [[site, frame] for site in (1, 3, 5) for frame in (1, 2, 3)]
    marks.revive()
    assert bool((folded == 1).all())


def test_a_view_of_another_shape_is_refused():
    with pytest.raises(tokentrim.UnsupportedContextError, match="neither"):
        Tombstones().mark(CacheRows([torch.ones(1, 2, 5, 1, 4)], 0, 6, 3), [[0]])


def test_history_that_is_longer_than_the_cache():
    """As where the rest of the rows is another rank's."""
    rows = CacheRows([torch.ones(1, 6, 1, 4)], 0, 8, 2)
    with pytest.raises(tokentrim.UnsupportedContextError, match="row 8 of a cache of 6 rows"):
        Tombstones().mark(rows, [[1]])
    with pytest.raises(tokentrim.UnsupportedContextError, match="row 8 of a cache of 6 rows"):
        FleetingMarks().hide(rows, torch.ones(1, 4, 2, dtype=torch.bool))
