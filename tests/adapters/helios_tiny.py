"""A tiny Helios: diffusers' own pipelines (classic and modular) and transformer, random weights; no text, no VAE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel
from tiny_weights import let_attention_matter

CHANNELS, TEXT = 4, 8
WINDOW = 3
"""Latent frames of a chunk."""


class TinyVae(torch.nn.Module):
    """What the pipeline asks of a VAE; it decodes every chunk even if latents come out."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        z_dim=CHANNELS,
    )

    def decode(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (latents.new_zeros(1, 3, 1, 8, 8),)


def transformer(seed: int = 0, **changes: Any) -> HeliosTransformer3DModel:
    """Two blocks; attention matters to the output."""
    torch.manual_seed(seed)
    model = HeliosTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "text_dim": TEXT,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_dim": (4, 4, 4),
            **changes,
        }
    )
    let_attention_matter(model, model.blocks)
    return model.eval().requires_grad_(False)


def scheduler(stages: int = 1) -> HeliosScheduler:
    """Single stage with a shifted schedule, as Helios-Base."""
    if stages > 1:
        return HeliosScheduler(stages=stages)
    return HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True, time_shift_type="linear")


def pipeline(seed: int = 0, **changes: Any) -> HeliosPipeline:
    """The classic pipeline."""
    pipe = HeliosPipeline(None, None, TinyVae(), scheduler(), transformer(seed, **changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular(seed: int = 0) -> Any:
    """The modular pipeline: its own denoising blocks, fed with embeddings."""
    from diffusers.modular_pipelines.helios.modular_blocks_helios import HeliosCoreDenoiseStep

    pipe = HeliosCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=transformer(seed), scheduler=scheduler())
    return pipe


def noise(*size: int, seed: int = 3) -> torch.Tensor:
    """Seeded noise."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def settings(batch: int = 1, cfg: float = 1.0, chunks: int = 4, **changes: Any) -> dict[str, Any]:
    """Arguments for chunks of WINDOW latent frames; 64 pixels are a grid of 4x4 tokens."""
    height, width = changes.pop("size", (64, 64))
    return {
        "prompt_embeds": noise(batch, 3, TEXT),
        "negative_prompt_embeds": noise(batch, 3, TEXT, seed=4),
        "height": height,
        "width": width,
        "num_latent_frames_per_chunk": WINDOW,
        "num_frames": ((WINDOW - 1) * 4 + 1) * chunks,
        "num_inference_steps": 2,
        "guidance_scale": cfg,
        "output_type": "latent",
        **changes,
    }


def run(pipe: HeliosPipeline, seed: int = 5, **changes: Any) -> torch.Tensor:
    """Generate and return the latents ``[B, C, F, H, W]``."""
    torch.manual_seed(seed)
    return pipe(generator=torch.Generator().manual_seed(seed), **settings(**changes)).frames


def run_modular(pipe: Any, seed: int = 5, **changes: Any) -> torch.Tensor:
    """The same with the modular pipeline, whose guider brings its own scale."""
    options = settings(**changes)
    for name in ("guidance_scale", "output_type"):
        options.pop(name)
    torch.manual_seed(seed)
    chunks = pipe(generator=torch.Generator().manual_seed(seed), output="latent_chunks", **options)
    return torch.cat(chunks, dim=2)
