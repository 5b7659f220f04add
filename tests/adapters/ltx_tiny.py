"""A tiny long-video LTX: diffusers' own pipeline loop and transformer, random weights; no text encoder, no VAE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import LTXEulerAncestralRFScheduler, LTXI2VLongMultiPromptPipeline, LTXVideoTransformer3DModel
from tiny_weights import let_attention_matter

CHANNELS, TEXT = 8, 8
WINDOW, TAIL, STRIDE = 5, 2, 3
"""Latent frames of a window, of the tail it is given, and from one window's start to the next."""


class TinyVae(torch.nn.Module):
    """What the pipeline asks of a VAE when latents come out."""

    dtype, device = torch.float32, torch.device("cpu")
    temporal_compression_ratio, spatial_compression_ratio = 8, 32
    config = SimpleNamespace(scaling_factor=1.0)
    latents_mean, latents_std = torch.zeros(CHANNELS), torch.ones(CHANNELS)

    def encode(self, image: torch.Tensor) -> SimpleNamespace:
        size = (1, CHANNELS, 1, image.shape[-2] // 32, image.shape[-1] // 32)
        return SimpleNamespace(latents=torch.randn(size, generator=torch.Generator().manual_seed(12)))


class TinyLTX(LTXI2VLongMultiPromptPipeline):
    """The real loop; prompts are seeded noise."""

    def encode_prompt(self, prompt: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        words = torch.randn(2, 1, 4, TEXT, generator=torch.Generator().manual_seed(len(str(prompt))))
        mask = torch.ones(1, 4)
        return words[0], mask, words[1], mask


def pipeline(seed: int = 0) -> TinyLTX:
    """A pipeline with two transformer blocks in which attention matters to the output."""
    torch.manual_seed(seed)
    model = LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT,
        num_layers=2,
    )
    let_attention_matter(model, model.transformer_blocks)
    scheduler = LTXEulerAncestralRFScheduler()
    pipe = TinyLTX(scheduler, TinyVae(), None, None, model.eval().requires_grad_(False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(windows: int = 4, cfg: float = 1.0, **changes: Any) -> dict[str, Any]:
    """128 pixels are a grid of 4x4 tokens; windows start at latent frames 0, 3, 6, 9."""
    generator = torch.Generator().manual_seed(3)
    return {
        "prompt": "a | bb | ccc",
        "height": 128,
        "width": 128,
        "num_frames": (WINDOW + STRIDE * (windows - 1) - 1) * 8 + 1,
        "temporal_tile_size": WINDOW * 8,
        "temporal_overlap": TAIL * 8,
        "sigmas": [1.0, 0.7, 0.4, 0.0],
        "guidance_scale": cfg,
        "negative_index_latents": torch.randn(1, CHANNELS, 1, 4, 4, generator=generator),
        "seed": 5,
        "output_type": "latent",
        **changes,
    }


def run(pipe: TinyLTX, **changes: Any) -> torch.Tensor:
    """Generate and return the latents ``[1, C, F, H, W]``."""
    torch.manual_seed(5)
    return pipe(**settings(**changes)).frames
