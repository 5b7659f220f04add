"""Models of diffusers that look a little like ours and must be refused, each with a reason that helps."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3Blocks
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareConditionLatentsStep

import tokentrim_hooks as tokentrim

SMALL_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
}


def wan():
    return diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, **SMALL_WAN)


def wan_animate():
    return diffusers.WanAnimateTransformer3DModel(
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        image_dim=4,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
        **SMALL_WAN,
    )


def sana_video():
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
    )


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def flux2():
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4, 4),
    )


def qwen_image():
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def hunyuan_video():
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=8,
    )


def minimax_h3():
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        ffn_dim=16,
        in_channels=4,
        audio_in_channels=4,
        text_dim=8,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=8,
        rope_freq_dim=2,
    )


class Pipeline:
    """Any pipeline around a transformer."""

    def __init__(self, transformer):
        self.transformer = transformer


STRANGERS = [wan, wan_animate, sana_video, flux, flux2, qwen_image, hunyuan_video, ltx, minimax_h3]


@pytest.mark.parametrize("make", STRANGERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a pipeline"])
def test_no_adapter_matches(make, inside):
    """Channel concatenation (WanAnimate), linear attention (Sana), text and image caches (Flux2, Qwen), no context."""
    model = Pipeline(make()) if inside else make()
    found = tokentrim.detect(model)
    assert not [answer.adapter for answer in found if answer.matches]
    assert not [answer for answer in found if "its probe failed" in answer.reason]
    with pytest.raises(tokentrim.UnsupportedModelError, match="cannot patch") as refusal:
        tokentrim.patch(model)
    shown = [answer.adapter for answer in found if f"  {answer.adapter}: {answer.reason}" in str(refusal.value)]
    assert len(shown) <= 2 and "tokentrim.detect(model)" in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (wan_animate, "channel by channel"),
        (sana_video, "linear attention sums all tokens"),
        (minimax_h3, "continues the one before or begins another"),
    ],
)
def test_reasons_that_say_what_is_different(make, reason):
    reasons = {answer.adapter: answer.reason for answer in tokentrim.detect(Pipeline(make()))}
    assert all(reason in reasons[name] for name in ("framepack", "helios", "anyflow-far"))


def test_a_clip_of_minimax_h3_is_told_of_its_own_rows_only():
    """If one of these becomes a clip's number or the clip before it, the refusal's reason is gone: then adapt it."""
    told = set(inspect.signature(diffusers.MiniMaxH3Transformer3DModel.forward).parameters) - {"self"}
    rows = {"hidden_states", "audio_hidden_states", "encoder_hidden_states", "timestep", "timestep_indices"}
    layout = {"token_tags", "position_ids", "video_indices", "audio_indices", "text_indices"}
    assert told == {*rows, *layout, "attention_kwargs", "return_dict"}


def test_a_request_of_minimax_h3_is_given_pixels_of_the_clip_before_at_most():
    """If a number, or latents of the clip before, are given to a request one day, clips can be told to be a chain."""
    blocks = MiniMaxH3Blocks()
    given = {each.name for each in blocks.inputs} - {None}
    pixels = {"image", "last_image", "keyframes", "keyframe_anchors", "references", "normalized_references"}
    made = {"condition_latents", "audio_condition_latents", "latents", "audio_latents"}  # of the pixels, and noise
    setting = {"prompt", "height", "width", "num_frames", "generator", "num_inference_steps", "attention_kwargs"}
    assert given == {*pixels, *made, *setting, "output_type"}
    owners = {kind: blocks.get_workflow(kind).expected_components for kind in ("t2va", "fl2va", "ref2va")}
    transformers = {kind: [c.name for c in all_ if "transformer" in c.name] for kind, all_ in owners.items()}
    assert transformers == {"t2va": ["transformer"], "fl2va": ["transformer"], "ref2va": ["transformer_ref"]}


def test_a_keyframe_of_minimax_h3_shares_no_bit_with_what_it_was_made_of():
    """Noised anew for each request: its rows cannot be found among those of the clip before."""
    noising = MiniMaxH3PrepareConditionLatentsStep().init_pipeline()
    noising.update_components(scheduler=diffusers.MiniMaxH3Scheduler())
    keyframe = torch.randn(1, 4, 1, 4, 4)
    given = {"condition_latents": [keyframe], "num_condition_video_rows": 4, "output": "condition_rows"}
    rows = [noising(**given) for _ in range(2)]
    assert 0 < float((rows[0] - rows[1]).abs().max()) < 0.1
    assert not (rows[0] == rows[1]).any()


def test_the_real_minimax_h3_pipeline_is_refused_in_words():
    pipe = MiniMaxH3Blocks().init_pipeline()
    pipe.update_components(transformer=minimax_h3())
    with pytest.raises(tokentrim.UnsupportedModelError, match="continues the one before or begins another"):
        tokentrim.patch(pipe)


def test_real_pipelines_are_no_match():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipelines = [
        diffusers.WanPipeline(None, None, None, scheduler, transformer=wan()),
        diffusers.FluxPipeline(scheduler, None, None, None, None, None, flux()),
        diffusers.LTXPipeline(scheduler, None, None, None, ltx()),
    ]
    for pipe in pipelines:
        assert not [answer.adapter for answer in tokentrim.detect(pipe) if answer.matches], type(pipe).__name__


@pytest.mark.parametrize("thing", [None, 3, "pipeline", torch.nn.Linear(2, 2), object()])
def test_what_is_no_model_is_refused_in_words(thing):
    found = tokentrim.detect(thing)
    assert found and not any(answer.matches or "its probe failed" in answer.reason for answer in found)
