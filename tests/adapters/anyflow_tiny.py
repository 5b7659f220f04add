"""A tiny AnyFlow FAR: diffusers' own pipeline and transformer, random weights; no text encoder, no VAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel
from diffusers.schedulers import FlowMapEulerDiscreteScheduler
from tiny_weights import let_attention_matter

CHANNELS, TEXT = 4, 8
PARTITION = [1, 2, 2, 2, 2]


def pipeline(seed: int = 0) -> AnyFlowFARPipeline:
    """Two blocks in which attention matters; two chunks in full (the one being made among them)."""
    torch.manual_seed(seed)
    model = AnyFlowFARTransformer3DModel(
        full_chunk_limit=3,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        chunk_partition=tuple(PARTITION),
    )
    let_attention_matter(model, model.blocks)
    pipe = AnyFlowFARPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=model.eval().requires_grad_(False),
        scheduler=FlowMapEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*size: int, seed: int = 3) -> torch.Tensor:
    """Seeded noise."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def run(pipe: AnyFlowFARPipeline, batch: int = 1, cfg: float = 1.0, **changes: Any) -> torch.Tensor:
    """Generate and return the latents ``[B, C, F, H, W]``: 64 pixels are a grid of 4x4 tokens, 2x2 compressed."""
    options: dict[str, Any] = {
        "prompt_embeds": noise(batch, 3, TEXT),
        "height": 64,
        "width": 64,
        "num_frames": (sum(changes.get("chunk_partition", PARTITION)) - 1) * 4 + 1,
        "num_inference_steps": 2,
        "guidance_scale": cfg,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(5),
        **changes,
    }
    if cfg > 1:
        options["negative_prompt_embeds"] = noise(batch, 3, TEXT, seed=4)
    torch.manual_seed(5)
    return pipe(**options).frames
