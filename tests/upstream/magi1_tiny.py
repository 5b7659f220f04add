"""MAGI-1's real model, sampler and pipeline with tiny random weights: 16 tokens per frame, 2 frames per chunk.

The source wants a GPU: kernels (triton, flash-attn, flashinfer) are replaced by plain ones, and devices are rewritten
to the CPU while :meth:`Repository.running` is open.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before there is a stand-in for triton, which it would find
import torch.distributed
import torch.utils._triton
from harness import checkout, plain_attention, randomise
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOKENS, WIDTH, LAYERS, TEXT = 16, 2, 2, 60
"""Tokens per frame, latent frames per chunk, layers, length of the prompt."""

STUBS = ("triton", "flash_attn", "flashinfer", "ffmpeg", "magi_attention")


@dataclass(frozen=True)
class Setup:
    """A configuration; ``passes`` 3 is the base model with guidance, 1 the distilled one."""

    passes: int = 3
    window: int = 4
    chunks: int = 5
    steps: int = 8
    ranges: tuple[int, ...] = (5, 4, 3, 2)
    clean_range: int = 1
    strategy: str = "none"
    offload: bool = False
    flex: bool = False
    prefix: int = 0
    devices: tuple[int, int] = (1, 1)
    """Devices for context parallelism and pipeline stages."""

    def but(self, **changes: Any) -> Setup:
        """A changed copy."""
        return replace(self, **changes)


@dataclass
class Repository:
    """The modules of an open checkout: what samples, what models are made of, the pipeline."""

    generate: Any
    model: Any
    layers: Any
    pipeline: Any
    common: Any

    def config(self, setup: Setup) -> Any:
        """The configuration object of upstream."""
        common = self.common
        model = common.ModelConfig(
            "tiny", num_layers=LAYERS, hidden_size=128, ffn_hidden_size=128, num_attention_heads=8, num_query_groups=4,
            kv_channels=16, params_dtype=torch.float32, caption_channels=16, caption_max_length=TEXT,
        )  # fmt: skip
        runtime = common.RuntimeConfig(
            cfg_number=setup.passes, noise2clean_kvrange=list(setup.ranges), clean_chunk_kvrange=setup.clean_range,
            clean_t=0.9999, num_frames=setup.chunks * WIDTH * 4, video_size_h=64, video_size_w=64,
            num_steps=setup.steps, window_size=setup.window, chunk_width=WIDTH,
        )  # fmt: skip
        engine = common.EngineConfig(
            distributed_backend="gloo", cp_strategy=setup.strategy, kv_offload=setup.offload,
            distill=setup.passes == 1, cp_size=setup.devices[0], pp_size=setup.devices[1],
        )  # fmt: skip
        return common.MagiConfig(model, runtime, engine)

    def build(self, setup: Setup) -> Any:
        """The real ``get_dit``: builds the model on meta, then loads weights, which are noise."""
        with self.running(setup):
            return self.model.get_dit(self.config(setup))

    @contextmanager
    def running(self, setup: Setup) -> Iterator[None]:
        """Everything that would go to the GPU goes to the CPU; ``flex`` takes the path of newer GPUs."""
        capability = (9, 0) if setup.flex else (8, 0)
        with ExitStack() as stack:
            for name, value in {"get_device_capability": capability, "current_device": 0}.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value: value))
            for name in ("synchronize", "max_memory_allocated", "max_memory_reserved", "memory_allocated"):
                stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_: 0))
            flex = flex_attention if setup.flex else None
            stack.enter_context(mock.patch.object(self.layers, "flex_attention", flex))
            stack.enter_context(mock.patch.object(self.model, "load_checkpoint", load_noise))
            stack.enter_context(OnCpu())
            stack.enter_context(mock.patch.object(self.generate.gc, "collect"))  # half a second per video
            stack.enter_context(mock.patch.object(self.generate, "tqdm", partial(self.generate.tqdm, disable=True)))
            yield

    def sample(self, dit: Any, setup: Setup, seed: int = 0) -> Tensor:
        """The real ``generate_per_chunk``: latents ``[1, C, T, H, W]``."""
        torch.manual_seed(seed)
        prefix = torch.randn(1, 4, setup.prefix, 8, 8) if setup.prefix else None
        with self.running(setup):
            return torch.cat(list(self.generate.generate_per_chunk(dit, prefix, *prompt())), dim=2)


def prompt() -> tuple[Tensor, Tensor]:
    """Caption embeddings and their mask, as the text encoder gives them."""
    caption = torch.randn(1, 1, TEXT, 16, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(1, TEXT, dtype=torch.int64)
    mask[:, :7] = 1
    return caption, mask


@contextmanager
def magi1(name: str = "MAGI-1", subfolder: str = "") -> Iterator[Repository]:
    """Open the checkout, or a fork's, in a process group of one."""
    torch.utils._triton.has_triton_package()  # asked while there is no stand-in, and remembered by torch
    with checkout(name, STUBS, subfolder) as folder, process_group():
        importlib.import_module("triton").jit = lambda function: function
        tokens = {"SPECIAL_TOKEN_PATH": str(folder / "example/assets/special_tokens.npz")}
        sys.modules.update(heavy_modules())
        with mock.patch.dict("os.environ", tokens):
            with OnCpu():
                pipeline = importlib.import_module("inference.pipeline.pipeline")
            opened = Repository(
                importlib.import_module("inference.pipeline.video_generate"),
                importlib.import_module("inference.model.dit.dit_model"),
                importlib.import_module("inference.model.dit.dit_module"),
                pipeline,
                importlib.import_module("inference.common"),
            )
            importlib.import_module("inference.infra.distributed.parallel_state").initialize_model_parallel()
            opened.common.magi_logger.setLevel("WARNING")
            replace_kernels(opened.layers)
            yield opened


def heavy_modules() -> dict[str, Any]:
    """Stand-ins for upstream's own text encoder and VAE, which are not ours to run."""
    names = {"inference.model.t5": ("T5Embedder",), "inference.model.vae": VAE}
    return {name: SimpleNamespace(**dict.fromkeys(parts, object)) for name, parts in names.items()}


VAE = ("AutoModel", "DiagonalGaussianDistribution", "VideoTokenizerABC")


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of one, as the model's parallel state wants it."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class OnCpu(TorchFunctionMode):
    """Rewrites every device to the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.cuda:
            return args[0]
        if on_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if function is Tensor.to:
            args = tuple("cpu" if on_gpu(argument) else argument for argument in args)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)


def on_gpu(device: Any) -> bool:
    """Whether an argument names a GPU."""
    if isinstance(device, (str, torch.device)):
        return str(device).startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def load_noise(model: Any) -> Any:
    """In place of a checkpoint."""
    bands = model.rope.get_default_bands()
    model.to_empty(device="cpu")
    randomise(model)
    model.rope.bands.data = bands
    return model


# ------------------------------------------------------------------------------------------ kernels


def replace_kernels(layers: Any) -> None:
    """Give the attention file kernels that run on a CPU."""
    layers.range_mod_triton = modulate
    layers.flash_apply_rotary_emb = rotate
    layers.flash_attn_func = flash_attention
    layers.flash_attn_varlen_func = varlen_attention


def modulate(x: Tensor, places: Tensor, gates: Tensor) -> Tensor:
    """``x`` ``[S, B, H]`` times the gate of every row."""
    return x * gates.flatten(0, 1)[places]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over halves of the first ``2 * cos.shape[-1]`` channels of ``[B, S, H, D]``."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Attention over ``[B, length, heads, head_dim]`` with grouped keys."""
    groups = q.shape[2] // k.shape[2]
    return plain_attention(q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **_: Any) -> Tensor:
    """Packed sequences one after the other; rows are ``[length, heads, head_dim]``."""
    own, seen = (torch.stack([x[:-1], x[1:]], dim=1) for x in (cu_seqlens_q, cu_seqlens_k))
    return flex_attention(q, k, v, own, seen)[0]


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: Tensor, k_ranges: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """MagiAttention's kernel: every range of queries sees its range of keys."""
    ranges = zip(q_ranges.tolist(), k_ranges.tolist(), strict=True)
    return torch.cat([flash_attention(q[None, a:b], k[None, c:d], v[None, c:d])[0] for (a, b), (c, d) in ranges]), None
