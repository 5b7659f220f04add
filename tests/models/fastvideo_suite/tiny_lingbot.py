"""FastVideo's own LingBot-World 2 on a CPU, tiny, in float32, with its own generation stage.

Outside the package: FlashAttention, which the transformer insists on, is torch's SDPA in the type that it is given; the
stage's caches and camera are float32; the condition video is noise (there is no VAE).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny import HEIGHT, TEXT, TOKENS, WIDTH

# isort: split
# FastVideo only after ``tiny``, which names what a CPU lacks.
from fastvideo.configs.models.dits.lingbotworld2 import (
    LingBotWorld2CausalFastArchConfig,
    LingBotWorld2CausalFastVideoConfig,
)
from fastvideo.models.dits.lingbotworld2 import causal_fast
from fastvideo.models.schedulers.scheduling_flow_unipc_multistep import FlowUniPCMultistepScheduler
from fastvideo.pipelines.basic.lingbotworld2 import causal_fast_pipeline
from foreign import randomised
from torch import Tensor, nn

PER_CHUNK, WINDOW, PROMPT = 2, 6, 8
AREA = HEIGHT * WIDTH * 64


def flash_attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Any = None, **_: Any) -> Tensor:
    """SDPA without a change of type."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


causal_fast.FLASH_ATTN_2_AVAILABLE = True
causal_fast.flash_attention = flash_attention
causal_fast_pipeline.get_local_torch_device = lambda: torch.device("cpu")


def arch(window: int = WINDOW, sinks: int = 1) -> Any:
    """2 layers, 2 heads of 24, four steps; the released schedule."""
    return LingBotWorld2CausalFastArchConfig(
        text_len=PROMPT, dim=48, ffn_dim=64, freq_dim=32, text_dim=TEXT, num_heads=2, num_layers=2,
        local_attn_size=window, sink_size=sinks, chunk_size=PER_CHUNK, max_area=AREA,
    )  # fmt: skip


class Stage(causal_fast_pipeline.LingBotWorld2CausalFastGenerationStage):
    """The stage with caches and a camera in float32, and no VAE."""

    device = torch.device("cpu")

    def _initialize_self_kv_cache(self, batch_size: int, kv_size: int, dtype: Any, device: Any) -> Any:
        return super()._initialize_self_kv_cache(batch_size, kv_size, torch.float32, device)

    def _initialize_crossattn_cache(self, batch_size: int, length: int, dtype: Any, device: Any) -> Any:
        return super()._initialize_crossattn_cache(batch_size, length, torch.float32, device)

    def _prepare_camera(self, *args: Any) -> Tensor:
        return super()._prepare_camera(*args).float()

    def _encode_condition_video(self, img: Any, h: int, w: int, frames: int, mask: Tensor, arguments: Any) -> Tensor:
        noise = torch.Generator().manual_seed(5)
        return torch.cat([mask, torch.randn(16, *mask.shape[1:], generator=noise)])


def stage(**options: Any) -> Any:
    """The stage around a transformer with random weights."""
    config = LingBotWorld2CausalFastVideoConfig(arch_config=arch(**options))
    transformer = randomised(causal_fast.LingBotWorld2CausalFastTransformer3DModel(config, hf_config={}))
    return Stage(transformer, FlowUniPCMultistepScheduler(shift=1.0, use_dynamic_shifting=False), vae=None)


def run(stage: Any, seed: int, chunks: int) -> Tensor:
    """The stage's own forward; latents ``[B, C, F, H, W]``."""
    torch.manual_seed(seed)  # the stage has a generator of its own, the kit watches the global one
    layer = stage.transformer.blocks[0].self_attn
    config = SimpleNamespace(dit_config=SimpleNamespace(arch_config=arch(layer.local_attn_size, layer.sink_size)))
    frames = 4 * (chunks * PER_CHUNK - 1) + 1
    with tempfile.TemporaryDirectory() as folder:
        poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
        poses[:, 2, 3] = np.arange(frames) * 0.1
        np.save(Path(folder) / "poses.npy", poses)
        np.save(Path(folder) / "intrinsics.npy", np.array([[400.0, 400.0, 416.0, 240.0]], dtype=np.float32))
        batch = SimpleNamespace(
            max_sequence_length=PROMPT, action_path=folder, num_frames=frames, seed=seed, prompt_attention_mask=None,
            pil_image=torch.zeros(3, 8 * HEIGHT, 8 * WIDTH),
            prompt_embeds=[torch.randn(1, PROMPT, TEXT, generator=torch.Generator().manual_seed(77))],
        )  # fmt: skip
        return stage.forward(batch, SimpleNamespace(pipeline_config=config, vae_cpu_offload=False)).latents


__all__ = ["PER_CHUNK", "TOKENS", "WINDOW", "run", "stage"]
