"""A tiny FramePack: diffusers' own pipeline loop and transformer, random weights; images and text are stubbed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)

CHANNELS, TEXT, POOLED, IMAGE = 4, 16, 8, 8
WINDOW = 3
"""Latent frames of a section."""


class TinyVae(torch.nn.Module):
    """What the pipeline asks of a VAE when latents come out."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(scaling_factor=1.0)
    temporal_compression_ratio, spatial_compression_ratio = 4, 8


class TinyFramePack(HunyuanVideoFramepackPipeline):
    """The real loop; encoders answer with seeded noise, and no image is read."""

    def encode_image(self, image: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        return torch.randn(len(image), 2, IMAGE, generator=torch.Generator().manual_seed(11))

    def prepare_image_latents(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        size = (len(image), CHANNELS, 1, image.shape[-2] // 8, image.shape[-1] // 8)
        return torch.randn(size, generator=torch.Generator().manual_seed(12))


def transformer(seed: int = 0) -> HunyuanVideoFramepackTransformer3DModel:
    """One double and one single stream block; attention matters to the output."""
    torch.manual_seed(seed)
    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        guidance_embeds=True,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 4, 4),
        has_image_proj=True,
        image_proj_dim=IMAGE,
        has_clean_x_embedder=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.to_v.weight.normal_(std=0.5)
    return model.eval().requires_grad_(False)


def pipeline(seed: int = 0) -> TinyFramePack:
    """A pipeline whose latents come out."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = TinyFramePack(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer(seed),
        vae=TinyVae(),
        scheduler=scheduler,
        text_encoder_2=None,
        tokenizer_2=None,
        image_encoder=None,
        feature_extractor=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(batch: int = 1, sampling: str = "vanilla", cfg: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Arguments for sections of WINDOW latent frames; 64 pixels are a grid of 4x4 tokens."""
    generator = torch.Generator().manual_seed(3)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    mask = torch.ones(batch, 6)
    mask[0, 4:] = 0
    height, width = changes.pop("size", (64, 64))
    prompt = {
        "prompt_embeds": noise(batch, 6, TEXT),
        "pooled_prompt_embeds": noise(batch, POOLED),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(batch, 6, TEXT),
        "negative_pooled_prompt_embeds": noise(batch, POOLED),
        "negative_prompt_attention_mask": torch.ones(batch, 6),
    }
    return {
        **prompt,
        "image": torch.rand(batch, 3, height, width, generator=generator),
        "height": height,
        "width": width,
        "latent_window_size": WINDOW,
        "num_frames": ((WINDOW - 1) * 4 + 1) * changes.pop("sections", 4),
        "num_inference_steps": 2,
        "true_cfg_scale": cfg,
        "sampling_type": sampling,
        "output_type": "latent",
        **changes,
    }


def run(pipe: TinyFramePack, seed: int = 5, **changes: Any) -> torch.Tensor:
    """Generate and return the latents ``[B, C, F, H, W]``."""
    torch.manual_seed(seed)
    return pipe(generator=torch.Generator().manual_seed(seed), **settings(**changes)).frames[-1]
