"""FastVideo's own causal Wan and causal stages on a CPU, tiny, with random weights.

Needs ``fastvideo`` on the path. Outside the package: the CPU has no attention backend and no torch device in its
tables, so both are named here; torchvision is an empty stand-in (FastVideo needs it for images only).
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from foreign import Stubs, randomised
from torch import Tensor, nn
from transformers import PreTrainedModel  # noqa: F401 - transformers must be imported before torchvision is stubbed

sys.meta_path.insert(0, Stubs("torchvision"))

from fastvideo.platforms.cpu import CpuPlatform  # noqa: E402

CpuPlatform.get_attn_backend_cls = classmethod(lambda cls, *_, **__: "fastvideo.attention.backends.sdpa.SDPABackend")

from fastvideo.configs.models.dits import WanVideoConfig  # noqa: E402
from fastvideo.configs.models.dits.wanvideo import WanVideoArchConfig  # noqa: E402
from fastvideo.distributed import parallel_state  # noqa: E402
from fastvideo.forward_context import set_forward_context  # noqa: E402
from fastvideo.models.dits.causal_wanvideo import CausalWanTransformer3DModel  # noqa: E402
from fastvideo.models.schedulers.scheduling_self_forcing_flow_match import SelfForcingFlowMatchScheduler  # noqa: E402
from fastvideo.pipelines.stages import causal_denoising  # noqa: E402

parallel_state._SP = SimpleNamespace(world_size=1, rank_in_group=0)
parallel_state._WORLD = SimpleNamespace(local_rank=1)  # not 0: no progress bar
causal_denoising.get_local_torch_device = lambda: torch.device("cpu")

torch.set_num_threads(1)
HEIGHT, WIDTH, PER_CHUNK, TEXT, WINDOW = 8, 12, 2, 32, 6
TOKENS = HEIGHT * WIDTH // 4
STEPS = (1000, 750, 500)


def transformer(policy: str = "absolute", sinks: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The real transformer: 2 layers, 2 heads of 24, a window of 6 frames; the head is not zero."""
    arch = WanVideoArchConfig(
        num_attention_heads=2, attention_head_dim=24, text_dim=TEXT, freq_dim=32, ffn_dim=64, num_layers=2,
        local_attn_size=WINDOW, sink_size=sinks, num_frames_per_block=PER_CHUNK, rope_cache_policy=policy,
    )  # fmt: skip
    arch.text_len = 8
    return randomised(CausalWanTransformer3DModel(WanVideoConfig(arch_config=arch), hf_config={}), seed).to(dtype)


def scheduler() -> Any:
    """FastVideo's scheduler with Self-Forcing's settings."""
    return SelfForcingFlowMatchScheduler(num_inference_steps=1000, shift=5.0, sigma_min=0.0, extra_one_step=True)


def prompt(batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Text embeddings ``[B, 8, TEXT]``."""
    return torch.randn(batch, 8, TEXT, generator=torch.Generator().manual_seed(77)).to(dtype)


def caches(net: Any, batch: int, ints: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """KV and cross-attention caches as the stage makes them, in float32; ``ints`` as other callers keep indices."""
    shape = (batch, WINDOW * TOKENS, 2, 24)
    index = (lambda: 0) if ints else (lambda: torch.zeros(1, dtype=torch.long))
    kv = [
        {"k": torch.zeros(shape), "v": torch.zeros(shape), "global_end_index": index(), "local_end_index": index()}
        for _ in net.blocks
    ]
    return kv, [{"k": None, "v": None, "is_init": False} for _ in net.blocks]


class Float32Stage(nn.Module):
    """The stage's loop in float32 (FastVideo's own is fixed to bfloat16): same calls, same scheduler functions."""

    def __init__(self, policy: str = "absolute", sinks: int = 1, ints: bool = False) -> None:
        super().__init__()
        self.transformer = transformer(policy, sinks)
        self.scheduler = scheduler()
        self.ints = ints

    @torch.no_grad()
    def forward(self, seed: int, chunks: int, batch: int = 1) -> Tensor:
        """Latents ``[B, C, F, H, W]``; all noise comes from the global random stream."""
        torch.manual_seed(seed)
        kv, cross = caches(self.transformer, batch, self.ints)
        convert = causal_denoising.pred_noise_to_pred_video  # named in forward, as in the stage's
        video = [self._chunk(index * PER_CHUNK, kv, cross, batch, convert) for index in range(chunks)]
        return torch.cat(video, dim=2)

    def _chunk(self, start: int, kv: Any, cross: Any, batch: int, convert: Any) -> Tensor:
        x = torch.randn(batch, 16, PER_CHUNK, HEIGHT, WIDTH)
        for step, timestep in enumerate(STEPS):
            if step:
                x = self._convert(self.scheduler.add_noise, x, torch.randn_like(x), timestep)
            flow = self._call(x, timestep, step, start, kv, cross)
            x = self._convert(convert, flow, x, timestep, self.scheduler)
        self._call(x, 0, 0, start, kv, cross)
        return x

    def _convert(self, function: Any, a: Tensor, b: Tensor, timestep: int, *more: Any) -> Tensor:
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (a, b)]
        done = function(*flat, torch.full((flat[0].shape[0],), timestep), *more)
        return done.unflatten(0, (a.shape[0], -1)).transpose(1, 2)

    def _call(self, x: Tensor, timestep: int, step: int, start: int, kv: Any, cross: Any) -> Tensor:
        with set_forward_context(current_timestep=step, attn_metadata=None):
            return self.transformer(
                x, [prompt(x.shape[0])], torch.full((x.shape[0], 1), timestep), kv_cache=kv, crossattn_cache=cross,
                current_start=start * TOKENS, start_frame=start,
            )  # fmt: skip


class CpuStage(causal_denoising.CausalDMDDenosingStage):
    """FastVideo's stage; ``device`` is a property that knows no CPU."""

    device = torch.device("cpu")


def real_stage(boundary: float | None = None) -> Any:
    """``CausalDMDDenosingStage`` in bfloat16; with ``boundary`` two transformers, as for Wan2.2."""
    second = transformer(seed=1, dtype=torch.bfloat16) if boundary is not None else None
    return CpuStage(transformer(dtype=torch.bfloat16), scheduler(), transformer_2=second)


def run_real_stage(stage: Any, seed: int, chunks: int, boundary: float | None = None, image: bool = False) -> Tensor:
    """Run the stage's own forward; returns latents ``[B, C, F, H, W]``."""
    torch.manual_seed(seed)
    latents = torch.randn(1, 16, chunks * PER_CHUNK, HEIGHT, WIDTH)
    text = SimpleNamespace(arch_config=SimpleNamespace(text_len=8))
    config = SimpleNamespace(
        dmd_denoising_steps=list(STEPS), warp_denoising_step=False, text_encoder_configs=[text],
        dit_config=SimpleNamespace(boundary_ratio=boundary, patch_size=(1, 2, 2)),
    )  # fmt: skip
    arguments = SimpleNamespace(pipeline_config=config, disable_autocast=True, vae_cpu_offload=False)
    batch = SimpleNamespace(
        latents=latents, prompt_embeds=[prompt(dtype=torch.bfloat16)], prompt_attention_mask=None, generator=None,
        pil_image=None, image_latent=None,
    )  # fmt: skip
    with torch.no_grad():
        return stage.forward(batch, arguments).latents
