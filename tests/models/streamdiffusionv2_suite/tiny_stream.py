"""StreamDiffusionV2's own pipeline on a CPU, tiny, with random weights. Needs ``streamdiffusionv2`` on the path.

Pipeline, wrapper, model and cache initialisers are the package's; only what would load weights is replaced.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from foreign import randomised
from models.wan import causal_model, causal_stream_inference, wan_wrapper
from torch import Tensor, nn

torch.set_num_threads(1)
HEIGHT, WIDTH = 8, 12
TOKENS = HEIGHT * WIDTH // 4
WINDOW, SINKS = 6, 2


def _model(*_: Any, **__: Any) -> Any:
    """2 layers, one head of 128 (the package's caches fix that size), the head not zero."""
    return randomised(
        causal_model.CausalWanModel(
            model_type="t2v", dim=128, ffn_dim=64, freq_dim=32, text_dim=32, num_heads=1, num_layers=2, text_len=8,
            cross_attn_norm=True,
        )
    )  # fmt: skip


class TextEncoder(nn.Module):
    """The same embeddings for every prompt."""

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        """Return ``{"prompt_embeds": [1, 8, 32]}``."""
        return {"prompt_embeds": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(7))}


wan_wrapper.WanModel.from_pretrained = classmethod(lambda cls, *_: nn.Module())
causal_model.CausalWanModel.from_pretrained = classmethod(_model)
causal_stream_inference.get_text_encoder_wrapper = lambda **_: lambda **__: TextEncoder()
causal_stream_inference.get_vae_wrapper = lambda **_: lambda **__: nn.Module()


def pipeline(
    steps: tuple[int, ...] = (700, 400, 0), sinks: int = SINKS, window: int = WINDOW, adaptive: float = -1
) -> Any:
    """``CausalStreamInferencePipeline``, built by its own constructor; the last of ``steps`` is dropped by it."""
    args = SimpleNamespace(
        model_type="T2V-1.3B", model_name="wan", generator_name="causal_wan", denoising_step_list=list(steps),
        t2v=False, warp_denoising_step=False, height=HEIGHT * 8, width=WIDTH * 8, num_kv_cache=window,
        num_sink_tokens=sinks, adapt_sink_threshold=adaptive,
    )  # fmt: skip
    pipe = causal_stream_inference.CausalStreamInferencePipeline(args, device="cpu")
    pipe.num_transformer_blocks, pipe.num_heads = 2, 1
    pipe.canonical_steps = pipe.denoising_step_list.clone()
    return pipe.eval()


def reset(pipe: Any) -> None:
    """What the package does between streams, and the queues of slots, which it forgets."""
    pipe.kv_cache1 = pipe.crossattn_cache = None
    pipe.denoising_step_list = pipe.canonical_steps.clone()
    for block in pipe.generator.model.blocks:
        block.self_attn.evict_idx = None


@torch.no_grad()
def run(pipe: Any, seed: int, chunks: int, rewind_at: int = 50) -> Tensor:
    """The loop of ``SingleGPUInferencePipeline.run_inference``, from noisy latents on; latents ``[B, F, C, H, W]``."""
    torch.manual_seed(seed)
    reset(pipe)
    start, end = 0, 2 * pipe.frame_seq_length
    video = [
        pipe.prepare(
            text_prompts=["a"], device="cpu", dtype=torch.float32, noise=torch.randn(1, 2, 16, HEIGHT, WIDTH),
            current_start=start, current_end=end, batch_denoise=False,
        )
    ]  # fmt: skip
    for index in range(1, chunks):
        start, end = end, end + pipe.frame_seq_length
        if start // pipe.frame_seq_length >= rewind_at:
            start = pipe.kv_cache_length - pipe.frame_seq_length
            end = start + pipe.frame_seq_length
        video.append(pipe.inference_wo_batch(torch.randn(1, 1, 16, HEIGHT, WIDTH), start, end, 700 - 10 * (index % 3)))
    return torch.cat(video, dim=1)
