"""vLLM-Omni's own LingBot-World transformer, cache and block runner on a CPU, tiny, with random weights.

Needs ``vllm`` (its Python part), ``vllm_omni`` and what they import on the path. Stood in for, as vLLM-Omni has no CPU
platform: the choice of the attention backend (its own SDPA, by the method for CUDA, which is plain torch), the rotary
embedding's kernel (its ``forward_native``, with heads as an axis), torchvision and torchaudio (empty).
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers.models.t5.modeling_t5  # noqa: F401 - before torchvision is stubbed: transformers asks for it
from harness import StubFinder, randomise
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: F401

assert diffusers
sys.meta_path.insert(0, StubFinder(("torchvision", "torchaudio")))

import vllm.platforms  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

vllm.platforms._current_platform = CpuPlatform()

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl  # noqa: E402
from vllm_omni.diffusion.distributed import parallel_state  # noqa: E402
from vllm_omni.diffusion.models.lingbot_world import transformer  # noqa: E402
from vllm_omni.diffusion.models.lingbot_world.dmd_block import LingBotDMDBlockRunner  # noqa: E402
from vllm_omni.platforms.interface import UnspecifiedOmniPlatform  # noqa: E402

HEIGHT, WIDTH, PER_CHUNK, TEXT, SINKS, WINDOW, CHUNKS = 8, 12, 2, 32, 2, 6, 7
TOKENS = HEIGHT * WIDTH // 4
SCHEDULE = ((1000.0, 1.0), (750.0, 0.75), (500.0, 0.5), (250.0, 0.25))
BACKEND = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"


def start() -> None:
    """One process, with vLLM-Omni's own groups over gloo."""
    UnspecifiedOmniPlatform.get_diffusion_attn_backend_cls = classmethod(lambda *_, **__: BACKEND)
    SDPAImpl.forward = SDPAImpl.forward_cuda
    meeting = f"file://{tempfile.mkdtemp()}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, meeting, 0, "gloo")
        parallel_state.initialize_model_parallel(data_parallel_size=1, sequence_parallel_size=1, backend="gloo")


def model(sinks: int = SINKS) -> Any:
    """The real transformer: 2 layers, 4 heads of 24."""
    with set_current_vllm_config(VllmConfig()):
        net = transformer.CausalLingBotWorldTransformer3DModel(
            num_attention_heads=4, attention_head_dim=24, text_dim=TEXT, freq_dim=32, ffn_dim=64, num_layers=2,
            sink_size=sinks, num_frames_per_block=PER_CHUNK, sliding_window_num_frames=WINDOW,
        )  # fmt: skip
    randomise(net)
    for module in net.modules():
        if getattr(module, "quant_method", None) is not None:
            module.quant_method.process_weights_after_loading(module)
        if type(module).__name__ == "RotaryEmbeddingWan":
            module._forward_method = partial(_rotated, module)
    return net


def _rotated(rope: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Any:
    return rope.forward_native(x, cosine.unsqueeze(-2), sine.unsqueeze(-2))


def video(net: Any, seed: int, chunks: int = CHUNKS) -> Tensor:
    """Latents ``[1, F, C, H, W]`` by the runner of the pipeline's request mode, with the request's own cache."""
    runner = LingBotDMDBlockRunner(net, device=torch.device("cpu"), enforce_eager=True)
    given, noise = (torch.Generator().manual_seed(seed + more) for more in (100, 0))
    text = torch.randn(1, 8, TEXT, generator=given)
    sizes = {"latent_height": HEIGHT, "latent_width": WIDTH, "device": torch.device("cpu"), "dtype": torch.float32}
    cache, made = net.allocate_cache(batch_size=1, **sizes), []
    with torch.no_grad():
        for chunk in range(chunks):
            condition, camera = (torch.randn(1, n, PER_CHUNK, HEIGHT, WIDTH, generator=given) for n in (20, 384))
            made.append(
                runner.generate_block(
                    condition=condition, camera=camera, prompt_embeds=text, cache=cache, ar=None,
                    start_frame=chunk * PER_CHUNK, schedule=SCHEDULE, generator=noise,
                    progress_bar=SimpleNamespace(update=lambda: None),
                )
            )  # fmt: skip
    return torch.cat(made, dim=2).transpose(1, 2).clone()
