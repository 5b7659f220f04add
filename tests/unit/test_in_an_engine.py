"""What the core offers to plugins of engines: a patch that costs no video, flow to x0, sessions that stay theirs."""

import warnings

import pytest
import tiny_reference as tiny
import torch
from tokentrim_hooks_adapters.self_forcing import SelfForcing

import tokentrim_hooks as tokentrim
from tokentrim_hooks.handle.handle import handle_of
from tokentrim_hooks.rollout.names import Names

VARIABLE = "SOME_ENGINE_POLICY"


def test_the_environment_says_how_to_prune(monkeypatch):
    model = tiny.make()
    monkeypatch.setenv(VARIABLE, '{"sensitivity": 0.0, "warmup": 1, "fraction": 0.5}')
    handle = tokentrim.patch_in_engine(model, SelfForcing, VARIABLE)
    assert handle is handle_of(model)
    assert handle.policy == tokentrim.DriftPolicy(sensitivity=0.0, warmup=1, fraction=0.5)
    tiny.run(model)
    assert len(handle.report) == tiny.CHUNKS
    assert tokentrim.patch_in_engine(model, SelfForcing, VARIABLE) is None, "it is patched already"
    assert handle.active
    handle.unpatch()


def test_without_it_the_paper_s_constants_hold(monkeypatch):
    model = tiny.make()
    monkeypatch.delenv(VARIABLE, raising=False)
    with tokentrim.patch_in_engine(model, SelfForcing, VARIABLE) as handle:
        assert handle.policy == tokentrim.DriftPolicy()


def test_a_refusal_warns_and_patches_nothing():
    stranger = torch.nn.Linear(2, 2)
    with pytest.warns(tokentrim.TokenTrimWarning, match="Linear stays unpatched"):
        assert tokentrim.patch_in_engine(stranger, SelfForcing, VARIABLE) is None
    assert not tokentrim.is_patched(stranger)


@pytest.mark.parametrize(
    ("text", "error"), [("[1]", ValueError), ("no json", ValueError), ('{"nothing": 1}', TypeError)]
)
def test_a_bad_variable_is_said(monkeypatch, text, error):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(error), warnings.catch_warnings():
        warnings.simplefilter("error")
        tokentrim.patch_in_engine(tiny.make(), SelfForcing, VARIABLE)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3)], ids=["a sample", "a sample, twice", "a frame"])
def test_x0_of_flow(shape):
    x0, noise, sigma = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), torch.rand(shape)
    spread = sigma.reshape(*shape, *[1] * (5 - len(shape)))
    latents, flow = (1 - spread) * x0 + spread * noise, (noise - x0).half()
    found = tokentrim.x0_of_flow(flow, latents, sigma)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), x0, rtol=0, atol=2e-2)


def test_grid_of():
    assert tokentrim.grid_of(torch.zeros(1, 2, 3, 8, 12), (2, 4)) == (4, 3)


def test_what_a_call_has_put_away_keeps_its_name():
    """A call may put other things in the place of what told videos apart; then its session is the same."""
    names, cache = Names(), torch.zeros(2)
    key = names.key((cache,))
    names.follow(key, (None,))
    assert names.key((cache,)) == key
    grown = torch.zeros(3)
    names.follow(key, (grown,))
    assert names.key((grown,)) == key
