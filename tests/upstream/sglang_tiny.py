"""SGLang's own causal Wan, cache class, stage and groups on a CPU, tiny, with random weights.

Needs ``sglang`` and what it imports on the path. Outside the package: torchvision is an empty stand-in (SGLang needs it
for images only), the server's arguments are the few that are read here, and layers run SGLang's own ``forward_native``,
for its kernels for CPUs are in another wheel; of that wheel one function, x (k + scale) + shift, is written out.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from harness import StubFinder
from torch import Tensor
from transformers import PreTrainedModel  # noqa: F401 - transformers must be imported before torchvision is stubbed

sys.meta_path.insert(0, StubFinder(("torchvision",)))

from sglang.multimodal_gen.configs.models.dits import WanVideoConfig  # noqa: E402
from sglang.multimodal_gen.configs.models.dits.wanvideo import WanVideoArchConfig  # noqa: E402
from sglang.multimodal_gen.runtime.distributed import parallel_state  # noqa: E402
from sglang.multimodal_gen.runtime.layers import layernorm  # noqa: E402
from sglang.multimodal_gen.runtime.models.dits.causal_wanvideo import CausalWanTransformer3DModel  # noqa: E402
from sglang.multimodal_gen.runtime.models.schedulers.scheduling_self_forcing_flow_match import (  # noqa: E402
    SelfForcingFlowMatchScheduler,
)
from sglang.multimodal_gen.runtime.pipelines_core.stages import causal_denoising  # noqa: E402
from sglang.multimodal_gen.runtime.server_args import set_global_server_args  # noqa: E402


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, scale_constant: float = 1.0) -> Tensor:
    """What SGLang's fused kernel computes, with its own rules for shapes."""
    scale, shift = (layernorm.expand_scale_shift_cpu_param(given, x) for given in (scale, shift))
    return x * (scale_constant + scale) + shift


layernorm.fuse_scale_shift_kernel = scale_shift
HEIGHT, WIDTH, PER_CHUNK, TEXT, WINDOW, SINKS = 8, 12, 2, 32, 6, 1
HEADS, HEAD_DIM = 4, 24
TOKENS = HEIGHT * WIDTH // 4
STEPS = (1000, 750, 500)


def start(rank: int, size: int, meeting: str) -> None:
    """SGLang's own groups over gloo, ``size`` ranks of tensor parallelism."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    options = {"attention_backend": "torch_sdpa", "enable_attention_backend_autotune": False, "kv_gather_degree": 1}
    set_global_server_args(SimpleNamespace(**options))
    parallel_state.maybe_init_distributed_environment_and_model_parallel(
        tp_size=size, sp_size=1, distributed_init_method=meeting
    )


def transformer(sinks: int = SINKS, weights: dict[str, Tensor] | None = None) -> Any:
    """The real transformer: 2 layers, 4 heads of 24; of ``weights`` SGLang's own loaders cut this rank's part."""
    arch = WanVideoArchConfig(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, text_dim=TEXT, freq_dim=32, ffn_dim=64, num_layers=2,
        local_attn_size=WINDOW, sink_size=sinks, num_frames_per_block=PER_CHUNK,
    )  # fmt: skip
    arch.text_len = 8
    net = CausalWanTransformer3DModel(WanVideoConfig(arch_config=arch), hf_config={})
    for name, parameter in net.named_parameters():
        whole = weights[name] if weights else _noise(name, parameter)
        load = getattr(parameter, "weight_loader", None)
        if weights and load is not None:
            load(parameter, whole)
        else:
            parameter.data.copy_(whole)
    for module in net.modules():
        if hasattr(module, "_forward_method"):
            module._forward_method = module.forward_native
    for block in net.blocks:
        block.attn2.forward = CrossAttention(block)
    return net.eval().requires_grad_(False)


class CrossAttention:
    """SGLang 0.5.23 gives ``attn2`` a parameter that it lacks (TypeError); its method for that serves LongLive 2."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, x: Tensor, context: Tensor, context_lens: None, crossattn_cache: Any) -> Tensor:
        return self.block._cross_attn_with_cache(x, context, crossattn_cache)


def _noise(name: str, parameter: Tensor) -> Tensor:
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    fan_in = noise[0].numel() if noise.ndim > 1 else 25
    return (1.0 if "norm" in name and name.endswith("weight") else 0.0) + noise * fan_in**-0.5


def prompt(batch: int) -> Tensor:
    """Text embeddings ``[B, 8, TEXT]``."""
    return torch.randn(batch, 8, TEXT, generator=torch.Generator().manual_seed(77))


class Stage(causal_denoising.CausalDMDDenoisingStage):
    """SGLang's stage, its forward as it is, in float32; what its constructor reads of a server is given here."""

    def __init__(self, sinks: int = SINKS, weights: dict[str, Tensor] | None = None, net: Any = None) -> None:
        net = transformer(sinks, weights) if net is None else net
        self.transformer, self.transformer_2 = net, None
        self.scheduler = SelfForcingFlowMatchScheduler(1000, shift=5.0, sigma_min=0.0, extra_one_step=True)
        self.causal_kv_cache = self.crossattn_cache = None
        self.num_transformer_blocks, self.num_frames_per_block = len(net.blocks), PER_CHUNK
        self.local_attn_size, self.sink_size, self.sliding_window_num_frames = WINDOW, sinks, WINDOW
        self.attn_backend = SimpleNamespace(get_enum=lambda: None)
        self._component_residency_manager, self._extra_func_kwarg_names_cache = None, {}

    def _target_dtype(self) -> torch.dtype:
        return torch.float32

    def _autocast_enabled(self, *_: Any) -> bool:
        return False

    def video(self, seed: int, chunks: int) -> Tensor:
        """Latents ``[1, C, F, H, W]``; all noise comes from the global random stream."""
        torch.manual_seed(seed)
        latents = torch.randn(1, 16, chunks * PER_CHUNK, HEIGHT, WIDTH)
        batch = SimpleNamespace(
            latents=latents, prompt_embeds=[prompt(1)], prompt_attention_mask=None, image_latent=None, generator=None,
            scheduler=None, extra={}, is_warmup=True,
        )  # fmt: skip
        return self.forward(batch, ARGUMENTS).latents


ARGUMENTS = SimpleNamespace(
    pipeline_config=SimpleNamespace(
        dmd_denoising_steps=list(STEPS), warp_denoising_step=False, context_noise=0,
        text_encoder_configs=[SimpleNamespace(arch_config=SimpleNamespace(text_len=8))],
    ),
    disable_autocast=True,
)  # fmt: skip
