"""Every bad input gets an error that says what to do, and leaves the model alone."""

import pytest
import tiny_reference as tiny
import torch
from tokentrim_hooks_adapters._wan import CausalWan
from torch import nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Match, plugins
from tokentrim_hooks.plugins import AdapterInfo
from tokentrim_hooks.testing import ForcedPolicy, assert_same, fingerprint


@pytest.fixture
def pipeline():
    model = tiny.make()
    before = fingerprint(model)
    yield model
    tokentrim.unpatch(model)
    assert_same(before, fingerprint(model), ignore={f"ReferencePipeline.{name}" for name in OWN})


OWN = ("kv_cache1", "crossattn_cache")
"""What a run of the pipeline sets by itself."""


@pytest.mark.parametrize("stranger", [object(), None, "pipeline", nn.Linear(2, 2), torch.zeros(1)])
def test_unsupported_object(stranger):
    with pytest.raises(tokentrim.UnsupportedModelError) as caught:
        tokentrim.patch(stranger)
    message = str(caught.value)
    assert type(stranger).__name__ in message and "docs/how-to/add-a-model.md" in message
    found = tokentrim.detect(stranger)
    assert f"none of {len(found)} adapters" in message and "tokentrim.detect(model)" in message
    assert len(message.splitlines()) == 2 and all(item.reason and not item.near for item in found)


def test_what_was_meant_is_said(pipeline):
    with pytest.raises(tokentrim.UnsupportedModelError, match=r"the class ReferencePipeline.*make one of it"):
        tokentrim.patch(type(pipeline))
    with pytest.raises(TypeError, match=r"got the class DriftPolicy: call it, DriftPolicy\(\)"):
        tokentrim.patch(pipeline, tokentrim.DriftPolicy)
    with pytest.raises(TypeError, match=r"got 'drift': make one of a name by tokentrim_hooks.make_policy\(name\)"):
        tokentrim.patch(pipeline, "drift")
    with pytest.raises(ValueError, match=r"list of policies is empty: give one, or ObservePolicy\(\)"):
        tokentrim.patch(pipeline, [])
    with pytest.raises(tokentrim.UnknownAdapterError, match=r"did you mean 'self-forcing'\? installed: "):
        tokentrim.patch(pipeline, adapter="self-forcin")
    with pytest.raises(tokentrim.UnknownPolicyError, match="no policy named 3; installed: "):
        tokentrim.make_policy(3)
    with pytest.raises(TypeError, match=r"no option 'fracton' \(did you mean 'fraction'\?\); known: "):
        tokentrim.make_policy("drift", fracton=0.1)


def test_unsupported_object_without_any_adapter(monkeypatch):
    monkeypatch.setattr(plugins, "found", lambda: plugins.Found((), ()))
    with pytest.raises(tokentrim.UnsupportedModelError, match="no adapter is installed or enabled"):
        tokentrim.patch(object())


def test_two_adapters_matching(monkeypatch, pipeline):
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    twin = type("Twin", (SelfForcing,), {"name": "twin"})
    both = (AdapterInfo("self-forcing", "a 1.0", SelfForcing), AdapterInfo("twin", "b 2.0", twin))
    monkeypatch.setattr(plugins, "found", lambda: plugins.Found(both, ()))
    with pytest.raises(tokentrim.AmbiguousModelError, match=r"self-forcing \(a 1.0\), twin \(b 2.0\).*adapter="):
        tokentrim.patch(pipeline)
    assert not tokentrim.is_patched(pipeline)
    with tokentrim.patched(pipeline, adapter="twin") as handle:
        assert handle.adapter.name == "twin"


def test_a_third_partys_more_specific_adapter_wins_over_a_built_in_one(monkeypatch, pipeline, caplog):
    """It derives from it, or names it; of two third parties none does."""
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    def install(*infos):
        monkeypatch.setattr(plugins, "found", lambda: plugins.Found(infos, ()))

    base = AdapterInfo("self-forcing", "tokentrim-hooks 1.0", SelfForcing)
    heir = AdapterInfo("heir", "mine 1.0", type("Heir", (SelfForcing,), {"name": "heir"}))
    body = {**vars(SelfForcing), "name": "named", "probe": SelfForcing.probe}
    apart = type("Apart", (CausalWan,), {**body, "_probe_layers": SelfForcing._probe_layers})
    named = type("Named", (apart,), {"name": "named", "instead_of": ("self-forcing",)})
    for winner in (heir, AdapterInfo("named", "mine 1.0", named)):
        install(base, winner)
        with caplog.at_level("INFO"), tokentrim.patched(pipeline) as handle:
            assert handle.adapter.name == winner.name
        assert f"self-forcing leaves the model to {winner.name}, which is more specific" in caplog.text
    for rivals in ((base, AdapterInfo("apart", "mine 1.0", apart)), (base, heir, AdapterInfo("named", "b 1", named))):
        install(*rivals)
        with pytest.raises(tokentrim.AmbiguousModelError, match="instead_of"):
            tokentrim.patch(pipeline)


def test_unknown_adapter_name(pipeline):
    with pytest.raises(tokentrim.UnknownAdapterError, match=r"did you mean 'self-forcing'\? installed"):
        tokentrim.patch(pipeline, adapter="self_forcing")


def test_named_adapter_that_does_not_match():
    with pytest.raises(tokentrim.UnsupportedModelError, match="self-forcing: "):
        tokentrim.patch(nn.Linear(2, 2), adapter="self-forcing")


def test_a_probe_that_crashes_is_a_reason(monkeypatch):
    def crash(model):
        raise RuntimeError("kaputt")

    bad = type("Bad", (), {"probe": staticmethod(crash), "constructors": ()})
    monkeypatch.setattr(plugins, "found", lambda: plugins.Found((AdapterInfo("bad", "bad 1.0", bad),), ()))
    with pytest.raises(tokentrim.UnsupportedModelError, match="bad: its probe failed with RuntimeError: kaputt"):
        tokentrim.patch(object())
    assert [d.matches for d in tokentrim.detect(object())] == [False]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"policy": "aggressive"}, TypeError, "make one of a name"),
        ({"policy": tokentrim.DriftPolicy}, TypeError, "call it"),
        ({"policy": [object()]}, TypeError, "with judge"),
        ({"probe": "last"}, ValueError, "'first-step' or 'candidate'"),
        ({"on_error": "ignore"}, ValueError, "'raise' or 'warn'"),
    ],
)
def test_bad_options(pipeline, options, kind, words):
    with pytest.raises(kind, match=words):
        tokentrim.patch(pipeline, **options)
    assert not tokentrim.is_patched(pipeline)


def test_patched_twice(pipeline):
    first = tokentrim.patch(pipeline)
    for model in (pipeline, pipeline.generator):
        with pytest.raises(tokentrim.AlreadyPatchedError, match="replace=True"):
            tokentrim.patch(model)
    assert first.active
    second = tokentrim.patch(pipeline, replace=True)
    assert second.active and not first.active
    first.unpatch()
    assert second.active, "an old handle takes nothing off but its own patch"


@pytest.mark.parametrize("place", ["generator", "block"])
def test_patched_after_module_compile(place):
    pipeline = tiny.make()
    module = pipeline.generator if place == "generator" else pipeline.generator.model.blocks[1]
    module.compile()
    with pytest.raises(tokentrim.CompiledModelError, match="patch first, then compile"):
        tokentrim.patch(pipeline)
    assert not tokentrim.is_patched(pipeline)


def test_patched_after_torch_compile():
    pipeline = tiny.make()
    pipeline.generator.model = torch.compile(pipeline.generator.model)
    with pytest.raises(tokentrim.CompiledModelError, match="compiled before it was patched"):
        tokentrim.patch(pipeline)
    assert not tokentrim.is_patched(pipeline)


def test_a_compiled_pipeline_module(pipeline):
    """torch.compile around the generator itself: still recognised, still refused."""
    compiled = torch.compile(pipeline.generator)
    with pytest.raises((tokentrim.CompiledModelError, tokentrim.UnsupportedModelError), match=r"compile|forward"):
        tokentrim.patch(compiled)
    vars(pipeline.generator).pop("_is_torch_compile", None)


def test_an_adapter_that_attaches_nothing(monkeypatch, pipeline):
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    def attach(self, model, patches):
        patches.hook(model.generator, before=lambda *_: None)

    idle = type("Idle", (SelfForcing,), {"name": "idle", "attach": attach})
    monkeypatch.setattr(plugins, "found", lambda: plugins.Found((AdapterInfo("idle", "idle 1.0", idle),), ()))
    before = fingerprint(pipeline)
    with pytest.raises(tokentrim.AttachError, match="no attention function"):
        tokentrim.patch(pipeline)
    assert_same(before, fingerprint(pipeline))


def test_an_attach_that_fails_halfway_is_rolled_back(monkeypatch, pipeline):
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    def attach(self, model, patches):
        SelfForcing.attach(self, model, patches)
        raise RuntimeError("half done")

    half = type("Half", (SelfForcing,), {"name": "half", "attach": attach})
    monkeypatch.setattr(plugins, "found", lambda: plugins.Found((AdapterInfo("half", "half 1.0", half),), ()))
    before = fingerprint(pipeline)
    with pytest.raises(RuntimeError, match="half done"):
        tokentrim.patch(pipeline)
    assert_same(before, fingerprint(pipeline))


def test_a_grid_that_the_patch_does_not_divide(monkeypatch):
    from tokentrim_hooks_adapters.self_forcing import SelfForcing

    odd = type("Odd", (SelfForcing,), {"name": "odd", "probe": classmethod(lambda cls, m: Match(m.generator, (3, 3)))})
    monkeypatch.setattr(plugins, "found", lambda: plugins.Found((AdapterInfo("odd", "odd 1.0", odd),), ()))
    pipeline = tiny.make()
    with tokentrim.patched(pipeline), pytest.raises(tokentrim.LatentsError, match="8x8 latent is not divisible"):
        tiny.run(pipeline)


def test_batch_size_changing_in_mid_rollout():
    """The user's own loop hands over fewer samples while the video goes on."""
    pipeline = tiny.make()
    with tokentrim.patched(pipeline):
        tiny.run(pipeline, batch=2, chunks=2)
        start = 2 * pipeline.num_frame_per_block
        with pytest.raises(tokentrim.LatentsError, match="batch size changed from 2 to 1"):
            pipeline._call(torch.randn(1, 2, 3, 8, 8), torch.full((1, 2), 1000), {}, start)


def test_unpatch_without_patch_does_nothing(pipeline):
    tokentrim.unpatch(pipeline)
    tokentrim.unpatch(object())
    assert not tokentrim.is_patched(pipeline) and not tokentrim.is_patched(None)


def test_no_chunk_seen_is_a_warning(pipeline):
    """Calls without a KV cache are training, not a rollout."""
    handle = tokentrim.patch(pipeline)
    pipeline.generator(torch.randn(1, 2, 3, 8, 8), {}, torch.full((1, 2), 500.0))
    with pytest.warns(tokentrim.TokenTrimWarning, match="no chunk was recognised"):
        handle.unpatch()


def test_handle_repr_and_settings(pipeline):
    with tokentrim.patched(pipeline, tokentrim.DriftPolicy(fraction=0.2)) as handle:
        text = repr(handle)
        assert text.startswith("<PatchHandle self-forcing DriftPolicy(fraction=0.2") and text.endswith("active>")
        settings = handle.report.settings
    assert (settings["adapter"], settings["policy.fraction"], settings["probe"]) == ("self-forcing", 0.2, "first-step")
    assert repr(handle).endswith("off>")


def test_two_models_of_the_same_code_do_not_disturb_each_other():
    """The tapped function is shared by both; only the patched model's own calls are filtered."""
    one, other = tiny.make(), tiny.make(seed=1)
    plain = tiny.run(other)
    with tokentrim.patched(one, ForcedPolicy({2: (1,)})), tokentrim.patched(other, tokentrim.ObservePolicy()) as second:
        tiny.run(one)
        assert torch.equal(plain, tiny.run(other))
        second.unpatch()
        tiny.run(one)
        assert torch.equal(plain, tiny.run(other))


class AlmostFastVideo(nn.Module):
    def _forward_inference(self, hidden_states, timestep, kv_cache, crossattn_cache, current_start):
        """Lacks start_frame."""


class AlmostLingBot(nn.Module):
    def forward(self, x, t, dit_cond_dict, kv_cache, crossattn_cache, current_start):
        """Lacks max_attention_size, and layers."""


class AlmostStreamDiffusion(nn.Module):
    prepare = inference_wo_batch = inference_stream = print


class AlmostSanaWM(nn.Module):
    def forward(self, hidden_states, timestep, video_rotary_emb, kv_cache):
        """Lacks kv_cache_mode."""


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        (AlmostFastVideo, "fastvideo"),
        (AlmostLingBot, "lingbot-world"),
        (AlmostStreamDiffusion, "streamdiffusion-v2"),
        (AlmostSanaWM, "sana-wm"),
    ],
)
def test_the_nearest_adapter_is_shown(model, adapter):
    with pytest.raises(tokentrim.UnsupportedModelError, match=f"nearest adapter, {adapter}: "):
        tokentrim.patch(model())
