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
from vllm_omni.diffusion.models.lingbot_world.dmd_block import ARBlockContext, LingBotDMDBlockRunner  # noqa: E402
from vllm_omni.experimental.ar_diffusion.capability import ARDiffusionKVBranchSpec  # noqa: E402
from vllm_omni.experimental.ar_diffusion.kv_cache import paged_attention  # noqa: E402
from vllm_omni.experimental.ar_diffusion.kv_cache.config import ARDiffusionKVConfig  # noqa: E402
from vllm_omni.experimental.ar_diffusion.kv_cache.manager import ARDiffusionKVCache  # noqa: E402
from vllm_omni.experimental.ar_diffusion.kv_cache.state import ARDiffusionKVState  # noqa: E402
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


class Video:
    """One video by the runner of the pipeline, block by block: its text, conditions and noise come from ``seed``.

    With ``pool`` it is a realtime session, whose rows lie in pages there; else a single request with its own cache.
    """

    def __init__(self, net: Any, seed: int, pool: Any = None) -> None:
        self.net, self.pool, self.chunks = net, pool, 0
        self.runner = LingBotDMDBlockRunner(net, device=torch.device("cpu"), enforce_eager=True)
        self.given, self.noise = (torch.Generator().manual_seed(seed + more) for more in (100, 0))
        self.text = torch.randn(1, 8, TEXT, generator=self.given)
        sizes = {"latent_height": HEIGHT, "latent_width": WIDTH, "device": torch.device("cpu"), "dtype": torch.float32}
        self.cache = net.allocate_cache(batch_size=1, **sizes) if pool is None else None
        self.session = None if pool is None else _session(net, pool, seed)

    def block(self) -> Tensor:
        """The next block ``[1, C, F, H, W]``."""
        condition, camera = (
            torch.randn(1, n, PER_CHUNK, HEIGHT, WIDTH, generator=self.given) for n in (20, 384)
        )
        with torch.no_grad():
            made = self.runner.generate_block(
                condition=condition, camera=camera, prompt_embeds=self.text, cache=self.cache, ar=self.session,
                start_frame=self.chunks * PER_CHUNK, schedule=SCHEDULE, generator=self.noise,
                progress_bar=SimpleNamespace(update=lambda: None),
            )  # fmt: skip
        self.chunks += 1
        return made

    def close(self) -> None:
        """Give a session's pages back."""
        if self.session is not None:
            self.session.state.close()


def pool(net: Any, sinks: int = SINKS) -> Any:
    """vLLM-Omni's pool of pages, a page a frame, for two sessions, as its runner makes it of the pipeline's spec."""
    config = ARDiffusionKVConfig(
        enable=True, chunk_size=TOKENS, window_chunks=WINDOW - sinks, sink_chunks=sinks, gpu_memory_fraction=1.0
    )
    page = 2 * 2 * TOKENS * 4 * 24 * 4
    return ARDiffusionKVCache(
        config, num_layers=2, num_kv_heads=4, head_size=24, dtype=torch.float32, block_size=TOKENS,
        max_model_len=1 << 20, available_bytes=24 * page, kv_branches=(ARDiffusionKVBranchSpec("main", 0),),
        session_capacity=2, frames_per_block=PER_CHUNK, device=torch.device("cpu"),
    )  # fmt: skip


def _session(net: Any, kv_cache: Any, seed: int) -> ARBlockContext:
    requests = {"main": kv_cache.begin_request(f"ar::{seed}::main")}
    state = ARDiffusionKVState(kv_cache, str(seed), requests, num_layers=len(net.blocks))
    return ARBlockContext(state=state, cross_attention=[None] * len(net.blocks), branch="main")


def video(net: Any, seed: int, chunks: int = CHUNKS, pages: Any = None) -> Tensor:
    """Latents ``[1, F, C, H, W]`` of one video; with ``pages``, a pool, of one session."""
    made = Video(net, seed, pages)
    blocks = [made.block() for _ in range(chunks)]
    made.close()
    return torch.cat(blocks, dim=2).transpose(1, 2).clone()


def paged_by_sdpa(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, *rest: Any, causal: bool) -> Tensor:
    """The same as vLLM-Omni's plain code for pages, with torch's kernel, under which the kit and references look."""
    _starts, lengths, scale = rest
    (length,) = lengths.tolist()
    heads = (query, *(pages[table[0].long()].flatten(0, 1)[:length] for pages in (keys, values)))
    q, k, v = (rows.transpose(0, 1)[None] for rows in heads)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)


def write_and_attend(inputs: Any, query: Tensor, *rows: Any) -> Tensor:
    """vLLM-Omni's operator by its own Python function: what torch sees as an operator shows nobody its inside."""
    names = paged_attention.ARDiffusionPagedLayerInputs._fields[1:]
    given = {name: getattr(inputs, name) for name in names if name != "seq_len"}
    *rows, scale = rows
    return paged_attention._paged_write_attn_impl(query, *rows, softmax_scale=scale, **given)
