"""The trained models: small files, faithful early on, each drifting in its own way later."""

import json

import pytest
import torch

from tokentrim_hooks.reference.held_out import by_chunk, rollout
from tokentrim_hooks.reference.kinds import FOLDER, KINDS, figures_file, load_model, weights_file
from tokentrim_hooks.reference.model import CausalVideoModel
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.reference.scenes import scenes

CHUNKS = 20
SCENE = scenes(7, 4, 3 * (1 + CHUNKS))
LATE = slice(12, CHUNKS)


FIRST = {"fading": 0.3, "burning": 0.6, "sink": 0.3, "framewise": 0.4}
FOURTH = {"fading": 0.6, "burning": 0.9, "sink": 0.6, "framewise": 0.75}
"""Bounds of the squared error in the first and fourth generated chunk, in units of a still's."""


@pytest.fixture(scope="module")
def curves():
    return {kind: by_chunk(rollout(ReferencePipeline.pretrained(kind), SCENE), SCENE) for kind in KINDS}


def late(curve):
    return sum(curve[LATE]) / len(curve[LATE])


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_small_and_have_their_figures(kind):
    assert weights_file(kind).stat().st_size < 4_000_000
    figures = json.loads(figures_file(kind).read_text())
    assert figures["kind"] == kind
    assert figures["held out"]["scenes"] == 64
    assert len(figures["held out"]["squared error"]) >= 10


def test_all_of_them_fit_into_the_wheel():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 5_500_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_is_a_plain_model_with_other_weights(kind):
    model, base = load_model(kind), load_model()
    assert {type(module) for module in model.modules()} == {type(module) for module in CausalVideoModel().modules()}
    assert model.state_dict().keys() == base.state_dict().keys()
    assert model.blocks[0].self_attn.sink_size == KINDS[kind].sink_size


def test_an_unknown_kind_names_those_there_are():
    with pytest.raises(ValueError, match="fading, burning, sink, framewise"):
        ReferencePipeline.pretrained("melting")


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_of_the_generator_per_step(kind):
    pipeline, calls = ReferencePipeline.pretrained(kind), []
    pipeline.generator.register_forward_hook(lambda *_: calls.append(1))
    pipeline.inference(torch.zeros(1, 6, 3, 32, 32))
    chunks = 6 // KINDS[kind].num_frame_per_block
    assert len(calls) == chunks * (len(pipeline.denoising_step_list) + 1)


def test_guidance_leaves_the_cache_as_it_would_be_without():
    noise, caches = torch.randn(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for weight in (1.0, 2.0):
        pipeline = ReferencePipeline.pretrained()
        pipeline.inference(torch.zeros(1, 6, 3, 32, 32), initial_latent=torch.zeros(1, 3, 3, 32, 32))
        pipeline._reset_caches(noise, 9)
        pipeline._call(0 * noise, torch.zeros(1, 3), {}, 0)
        pipeline.generator.model.guidance = weight
        pipeline._call(noise, torch.full((1, 3), 500), {}, 3)
        caches.append(pipeline.kv_cache1[-1]["k"][:, : 6 * 64].clone())
    assert torch.equal(*caches)


@pytest.mark.parametrize("kind", KINDS)
def test_early_chunks_are_faithful(kind, curves):
    error, still = curves[kind]["squared error"], curves[kind]["still"]
    assert error[0] < FIRST[kind] * still[0]
    assert error[3] < FOURTH[kind] * still[3]
    assert min(curves[kind]["sprites alive"][:3]) > 0.7


def test_fading_fades(curves):
    for measure in ("contrast", "saturation", "sharpness"):
        assert late(curves["fading"][measure]) < 0.95


def test_burning_burns(curves):
    for measure in ("background contrast", "sharpness"):
        assert late(curves["burning"][measure]) > 1.2
        assert late(curves["burning"][measure]) > late(curves["fading"][measure]) + 0.3
    for measure in ("contrast", "saturation"):
        assert late(curves["burning"][measure]) > late(curves["fading"][measure])


def test_sprites_live_longer_with_a_sink(curves):
    assert late(curves["sink"]["sprites alive"]) > late(curves["fading"]["sprites alive"]) + 0.05
