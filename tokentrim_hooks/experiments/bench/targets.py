"""What ``tokentrim bench`` measures: models with random weights, at the sizes that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokentrim_hooks.experiments.bench import fastvideo_target
from tokentrim_hooks.experiments.bench.target import Size, Target
from tokentrim_hooks.extras import require


def reference(size: Size) -> Target:
    """The reference model at the trained size; ``full``: with 12 layers of 6 x 64 on a 16 x 16 grid."""
    shape = {"layers": 12, "dim": 384, "heads": 6} if size.full else {"layers": 6, "dim": 128, "heads": 4}
    side = 16 if size.full else 8
    return _of_reference(size, shape, (side, side))


def attention(size: Size) -> Target:
    """Two layers with self attention as large a part as in Self-Forcing's: five times the linear layers' work.

    ``full``: two of its layers as they are, 12 heads of 128, 1,560 tokens per frame.
    """
    heads, dim, grid = (12, 1536, (30, 52)) if size.full else (2, 128, (8, 16))
    return _of_reference(size, {"layers": 2, "dim": dim, "heads": heads}, grid)


def _of_reference(size: Size, shape: dict[str, int], grid: tuple[int, int]) -> Target:
    from tokentrim_hooks.reference.pipeline import ReferencePipeline

    pipeline = ReferencePipeline.random(grid=grid, device=size.device, dtype=size.dtype, **shape)

    def run() -> Any:
        torch.manual_seed(0)
        noise = torch.randn(1, 3 * size.chunks, 3, 4 * grid[0], 4 * grid[1]).to(size.device, size.dtype)
        return pipeline.inference(noise)

    words = {**shape, "tokens per frame": grid[0] * grid[1], "window": "21 frames", "calls per chunk": 5}
    return Target(pipeline, run, words, pipeline.generator, calls=5, patch=4)


def skyreels(size: Size) -> Target:
    """diffusers' SkyReels-V2 diffusion forcing: windows with a prefix, no cache. ``full`` is its 1.3 B transformer."""
    diffusers = require("diffusers")
    heads, width, layers = (12, 128, 30) if size.full else (2, 24, 2)
    pixels = (480, 832) if size.full else (128, 128)
    torch.manual_seed(0)
    channels, text = 16, 64
    with torch.device(size.device):
        transformer = diffusers.SkyReelsV2Transformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=width, in_channels=channels,
            out_channels=channels, text_dim=text, freq_dim=256 if size.full else 32, ffn_dim=heads * width * 6,
            num_layers=layers, cross_attn_norm=True,
        )  # fmt: skip
    transformer = transformer.to(size.device, size.dtype).eval().requires_grad_(False)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    pipeline = diffusers.SkyReelsV2DiffusionForcingPipeline(None, None, transformer, None, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 16, text).to(size.device, size.dtype)
    # A window of 4 latent frames of which 2 are the previous window's: each later window brings 2, one chunk.
    frames = 13 + 8 * (size.chunks - 1)

    def run() -> Any:
        torch.manual_seed(0)
        return pipeline(
            prompt=None, prompt_embeds=embeds, negative_prompt_embeds=embeds, height=pixels[0], width=pixels[1],
            num_frames=frames, base_num_frames=13, overlap_history=5, num_inference_steps=5, guidance_scale=1.0,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    tokens = pixels[0] * pixels[1] // 256
    words = {"layers": layers, "heads": f"{heads} x {width}", "tokens per frame": tokens, "calls per chunk": 5,
             "window": "4 latent frames, 2 of them history"}  # fmt: skip
    return Target(pipeline, run, words, transformer, calls=5, frames_dim=2)


TARGETS: dict[str, Callable[[Size], Target]] = {
    "reference": reference,
    "attention": attention,
    "skyreels": skyreels,
    "fastvideo": fastvideo_target.make,
}
