"""A tiny SANA-WM refiner: diffusers' own pipeline and transformer, random weights; no text encoder, no VAE."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2RefinerTransformer3DModel
from diffusers.pipelines.sana_wm.refiner import SanaWMLTX2Refiner
from tiny_weights import let_attention_matter

CHANNELS, TEXT, GRID, BLOCK, LAYERS, STEPS = 4, 8, (4, 6), 3, 2, 3
SINK, HISTORY = 1, 6
"""Frames of the sink and, at most, of the history: two chunks; as shipped 1 and 10, which are no whole chunks."""


class Refiner(SanaWMLTX2Refiner):
    """A prompt is its number of letters, as noise."""

    def _encode_prompt(self, prompt: str, *, device: Any, dtype: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return noise(1, 5, TEXT, seed=len(prompt)), torch.tensor([[0, 1, 1, 1, 1]])


class QuietRefiner(Refiner):
    """Captures its sink past the transformer's hooks, for the kit, which asks of every call what chunk it is of."""

    def _capture_block_kv(self, **given: Any) -> None:
        if given["kv_cache_mode"] != "capture_pre_rope":
            return super()._capture_block_kv(**given)
        past = mock.patch.object(type(self.transformer), "__call__", type(self.transformer).forward)
        with past, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*was called directly, which runs no hooks")  # so it is meant
            return super()._capture_block_kv(**given)


def pipeline(seed: int = 0, kind: type[SanaWMLTX2Refiner] = Refiner) -> SanaWMLTX2Refiner:
    """Two blocks in which attention matters."""
    torch.manual_seed(seed)
    model = SanaWMLTX2RefinerTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=LAYERS,
        caption_channels=TEXT,
        rope_type="split",
        gated_attn=True,
    )
    let_attention_matter(model, model.transformer_blocks)
    pipe = kind(
        transformer=model.eval().requires_grad_(False),
        connectors=None,
        tokenizer=None,
        text_encoder=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*size: int, seed: int = 3) -> torch.Tensor:
    """Seeded noise."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def run(pipe: SanaWMLTX2Refiner, seed: int = 5, chunks: int = 7, **changes: Any) -> torch.Tensor:
    """Refine noise; return the latents ``[B, C, F, H, W]``, the sink's frame first."""
    options: dict[str, Any] = {"prompt": "a cat", "fps": 24.0, "kv_max_frames": SINK + HISTORY, **changes}
    generator = torch.Generator().manual_seed(seed)
    frames = options.get("sink_size", SINK) + BLOCK * chunks
    return pipe(noise(1, CHANNELS, frames, *GRID), generator=generator, output_type="latent", **options)
