"""Tiny SkyReels-V2 diffusion-forcing pipelines: the real diffusers code, random weights, one second on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

CHANNELS, TEXT = 4, 8
SIZE = 64
"""Pixels; 8x8 latents, a grid of 4x4 tokens."""
TOKENS = 16
LAYERS = 2


def transformer(seed: int = 0) -> SkyReelsV2Transformer3DModel:
    """A transformer of two layers whose output is not near zero.

    Without fps embedding: upstream's fails for a batch of more than one (diffusers 0.42).
    """
    torch.manual_seed(seed)
    model = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=LAYERS,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "scale_shift" not in name:
                parameter.normal_(std=0.2)
        # Attention must matter, or a prune that does nothing could pass.
        for block in model.blocks:
            block.attn1.to_v.weight.normal_(std=0.5)
            block.attn1.to_out[0].weight.normal_(std=0.5)
    return model.eval().requires_grad_(False)


def autoencoder(seed: int = 1) -> AutoencoderKLWan:
    """A small VAE, for the pipelines that encode an image or a clip."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    return vae.eval().requires_grad_(False)


KINDS = {
    "text": SkyReelsV2DiffusionForcingPipeline,
    "image": SkyReelsV2DiffusionForcingImageToVideoPipeline,
    "video": SkyReelsV2DiffusionForcingVideoToVideoPipeline,
}


def pipeline(kind: str = "text", seed: int = 0) -> Any:
    """A pipeline without text encoder; pass ``**prompt()``. Latents come out (``output_type='latent'``)."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    vae = None if kind == "text" else autoencoder()
    pipe = KINDS[kind](None, None, transformer(seed), vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(batch: int = 1, seed: int = 2) -> dict[str, torch.Tensor]:
    """Random prompt embeddings, with their negatives."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(batch, 3, TEXT, generator=generator),
        "negative_prompt_embeds": torch.randn(batch, 3, TEXT, generator=generator),
    }


def settings(**changes: Any) -> dict[str, Any]:
    """Arguments of a long synchronous video of 3 windows: latent frames 0-3, 4-5, 6-7, each with a prefix of 2."""
    return {
        **prompt(changes.pop("batch", 1)),
        "prompt": None,
        "height": SIZE,
        "width": SIZE,
        "num_frames": 29,
        "base_num_frames": 13,
        "overlap_history": 5,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "output_type": "latent",
        **changes,
    }


def run(pipe: Any, seed: int = 5, **changes: Any) -> torch.Tensor:
    """Generate and return the latents ``[B, C, F, H, W]``."""
    arguments = settings(**changes)
    torch.manual_seed(seed)
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(seed), **arguments).frames)
