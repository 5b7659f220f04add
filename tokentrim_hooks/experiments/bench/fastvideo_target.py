"""FastVideo's ``CausalWanTransformer3DModel`` with random weights, sampled as FastVideo's causal stage samples it.

``full`` is Self-Forcing's size: Wan2.1 1.3 B, 30 layers of 12 x 128, 60 x 104 latents (1,560 tokens per frame), chunks
of 3 latent frames, a window of 21, four denoising calls and one that commits. The sampler is written out here, because
the package's own loop decodes and needs a text encoder; the transformer and its KV cache are FastVideo's.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.bench.target import Size, Target

STEPS = (1000, 750, 500, 250)
FRAMES, WINDOW, TEXT = 3, 21, 512


@dataclass(frozen=True)
class Shape:
    """Sizes of the transformer; latents are ``[B, 16, F, height, width]``."""

    layers: int
    heads: int
    width: int
    ffn: int
    height: int
    latent_width: int

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.height * self.latent_width // 4


FULL = Shape(30, 12, 128, 8960, 60, 104)
SMALL = Shape(2, 4, 32, 256, 16, 24)


def make(size: Size) -> Target:
    """The transformer on random weights and one rollout.

    Raises:
        TokenTrimError: fastvideo is not to be imported, and why.
    """
    shape = FULL if size.full else SMALL
    made, version = sampler(shape, size)
    words = {"layers": shape.layers, "heads": f"{shape.heads} x {shape.width}", "tokens per frame": shape.tokens,
             "window": f"{WINDOW} frames", "calls per chunk": len(STEPS) + 1, "fastvideo": version}  # fmt: skip
    steps = len(STEPS) + 1
    return Target(made, lambda: made(0), words, made.transformer, calls=steps, frames_dim=2)


def sampler(shape: Shape, size: Size) -> tuple[Sampler, str]:
    """The transformer on random weights with its sampler, and FastVideo's version.

    Raises:
        TokenTrimError: fastvideo is not to be imported, and why.
    """
    parts = _import(size)
    return Sampler(_transformer(parts, shape, size), parts.set_forward_context, shape, size), parts.version


class Sampler(nn.Module):
    """FastVideo's causal loop: noise levels as sigma = timestep / 1000, new noise between the steps."""

    def __init__(self, transformer: nn.Module, set_forward_context: Any, shape: Shape, size: Size) -> None:
        super().__init__()
        self.transformer, self.context, self.shape, self.size = transformer, set_forward_context, shape, size
        self.prompt = torch.randn(1, TEXT, 4096 if size.full else 64).to(size.device, size.dtype)

    @torch.no_grad()
    def forward(self, seed: int) -> Tensor:
        """One video, latents ``[1, 16, F, H, W]``."""
        torch.manual_seed(seed)
        kv, cross = self.caches()
        convert = pred_noise_to_pred_video  # named here, as in the stage's forward: by that a loop like its own is told
        return torch.cat([self._chunk(FRAMES * i, kv, cross, convert) for i in range(self.size.chunks)], dim=2)

    def _chunk(self, start: int, kv: Any, cross: Any, convert: Any) -> Tensor:
        x = self._noise()
        clean = x
        for index, step in enumerate(STEPS):
            sigma = step / 1000
            if index:
                x = (1 - sigma) * clean + sigma * self._noise()
            clean = convert(self.call(x, step, index, start, kv, cross), x, sigma)
        self.call(clean, 0, 0, start, kv, cross)
        return clean

    def _noise(self) -> Tensor:
        shape = (1, 16, FRAMES, self.shape.height, self.shape.latent_width)
        return torch.randn(shape, device=self.size.device, dtype=self.size.dtype)

    def call(self, x: Tensor, timestep: int, index: int, start: int, kv: Any, cross: Any) -> Tensor:
        """Flow ``[B, 16, F, H, W]`` of the chunk that begins at frame ``start``; ``index`` is the step's ordinal."""
        context: AbstractContextManager[Any] = self.context(current_timestep=index, attn_metadata=None)
        with context:
            flow: Tensor = self.transformer(
                x, [self.prompt], torch.full((1, 1), timestep, device=x.device), kv_cache=kv, crossattn_cache=cross,
                current_start=start * self.shape.tokens, start_frame=start,
            )  # fmt: skip
        return flow

    def caches(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Empty ones of self attention and of cross attention, by layer."""
        rows = (1, WINDOW * self.shape.tokens, self.shape.heads, self.shape.width)
        place = {"device": self.size.device, "dtype": self.size.dtype}
        layers = range(self.shape.layers)
        # Plain numbers, as FastVideo's own stage keeps them where no graph is captured: reading them waits for nothing.
        kv = [{"k": torch.zeros(rows, **place), "v": torch.zeros(rows, **place),  # type: ignore[call-overload]
               "global_end_index": 0, "local_end_index": 0} for _ in layers]  # fmt: skip
        return kv, [{"k": None, "v": None, "is_init": False} for _ in layers]


def pred_noise_to_pred_video(flow: Tensor, latents: Tensor, sigma: float) -> Tensor:
    """x0, as FastVideo's function of that name has it."""
    return latents - sigma * flow


def _transformer(parts: Any, shape: Shape, size: Size) -> Any:
    arch = parts.arch(
        num_attention_heads=shape.heads, attention_head_dim=shape.width, text_dim=4096 if size.full else 64,
        freq_dim=256, ffn_dim=shape.ffn, num_layers=shape.layers, local_attn_size=WINDOW, sink_size=0,
        num_frames_per_block=FRAMES, rope_cache_policy="absolute",
    )  # fmt: skip
    arch.text_len = TEXT
    model = parts.model(parts.config(arch_config=arch), hf_config={})
    model = model.to(size.device, size.dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, base, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02)
    return model


def _import(size: Size) -> Any:
    try:
        return _parts(size)
    except ImportError as failure:
        raise TokenTrimError(
            f"cannot import fastvideo ({failure}); install it beside its pins (`make test-models` does, into a folder "
            "for PYTHONPATH) or choose another --target"
        ) from failure


def _parts(size: Size) -> Any:
    """FastVideo's classes, with what one process on a CPU lacks put in: an attention backend, a group of one."""
    import transformers  # noqa: F401 - before torchvision is stood in for

    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, _NoVision())
    from importlib.metadata import version

    if torch.device(size.device).type == "cpu":
        from fastvideo.platforms.cpu import CpuPlatform

        backend = "fastvideo.attention.backends.sdpa.SDPABackend"
        CpuPlatform.get_attn_backend_cls = classmethod(lambda cls, *_, **__: backend)
    from fastvideo.configs.models.dits import WanVideoConfig
    from fastvideo.configs.models.dits.wanvideo import WanVideoArchConfig
    from fastvideo.distributed import parallel_state
    from fastvideo.forward_context import set_forward_context
    from fastvideo.models.dits.causal_wanvideo import CausalWanTransformer3DModel

    parallel_state._SP = parallel_state._SP or SimpleNamespace(world_size=1, rank_in_group=0)
    return SimpleNamespace(model=CausalWanTransformer3DModel, config=WanVideoConfig, arch=WanVideoArchConfig,
                           set_forward_context=set_forward_context, version=version("fastvideo"))  # fmt: skip


class _NoVision:
    """Imports torchvision as an empty package: FastVideo names it for images only."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Claim torchvision and all below it."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """A module of which any attribute is an empty class."""
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class _Anything(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
