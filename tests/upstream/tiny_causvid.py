"""CausVid's real wrapper, causal model and pipeline around tiny random weights: 80 tokens per frame, 3 layers."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers.models.modeling_utils
import torch
import transformers.models.t5.modeling_t5  # noqa: F401 - before torchvision is stubbed: transformers asks for it
from harness import NoVae, StubModule, TinyTextEncoder, checkout, in_float32, plain_attention
from tiny_self_forcing import HEADS, LAYERS, TEXT, TOKENS, WIDTH, new_text_cache, tiny_model
from torch import Tensor

PACKAGE = "causvid.models.wan"


@dataclass(frozen=True)
class Repository:
    """The modules of an open checkout."""

    pipeline: Any
    wrapper: Any
    attention: Any


class OnCpu(types.ModuleType):
    """torch, for a file that writes ``device="cuda"`` where it means the device of its tensors."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def ones(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """``torch.ones`` on the CPU."""
        return torch.ones(*args, **kwargs)


@contextmanager
def causvid() -> Iterator[Repository]:
    """Open the checkout with the real constructors ready to build tiny models; SDXL's are not needed."""
    assert diffusers
    with checkout("CausVid", stubs=("torchvision", "imageio", "lmdb", "decord", "cv2", "wandb")):
        sys.modules["causvid.models.sdxl.sdxl_wrapper"] = StubModule("causvid.models.sdxl.sdxl_wrapper")
        pipeline = importlib.import_module(f"{PACKAGE}.causal_inference")
        causal = importlib.import_module(f"{PACKAGE}.causal_model")
        base = importlib.import_module(f"{PACKAGE}.wan_base.modules.model")
        in_float32(causal.attention)
        with (
            mock.patch.object(base, "flash_attention", plain_attention),
            mock.patch.object(causal.CausalWanModel, "from_pretrained", classmethod(tiny_model)),
            mock.patch.object(base.WanModel, "from_pretrained", classmethod(tiny_model)),
            mock.patch.object(pipeline, "torch", OnCpu("torch")),
            mock.patch.object(pipeline, "get_text_encoder_wrapper", lambda **_: lambda: TinyTextEncoder(*TEXT)),
            mock.patch.object(pipeline, "get_vae_wrapper", lambda **_: NoVae),
        ):
            yield Repository(pipeline, importlib.import_module(f"{PACKAGE}.wan_wrapper"), causal)


@dataclass(frozen=True)
class Setup:
    """A configuration: frames per chunk, batch, denoising steps (upstream's, already warped)."""

    block: int = 3
    batch: int = 1
    steps: tuple[int, ...] = (1000, 757, 522)

    def trace(self) -> dict[str, int]:
        """Denoiser calls of one chunk."""
        return {"first": 1, "refine": len(self.steps) - 1, "commit": 1}


def pipeline_of(repository: Repository, setup: Setup) -> Any:
    """The real ``InferencePipeline``, its literal sizes brought down to the tiny model's."""
    options = SimpleNamespace(
        model_name="causal_wan", denoising_step_list=[*setup.steps, 0], warp_denoising_step=False,
        num_frame_per_block=setup.block,
    )  # fmt: skip
    pipeline = repository.pipeline.InferencePipeline(options, "cpu")
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = LAYERS, TOKENS
    shape = (setup.batch, 36 * TOKENS, HEADS, WIDTH // HEADS)
    pipeline.kv_cache1 = [{"k": torch.zeros(shape), "v": torch.zeros(shape)} for _ in range(LAYERS)]
    pipeline.crossattn_cache = new_text_cache(setup)  # type: ignore[arg-type]
    return pipeline

