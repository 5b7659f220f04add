"""Self-Forcing's real wrapper, model and pipelines around tiny random weights: 80 tokens per frame, 3 layers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers.models.modeling_utils
import torch
import transformers.models.t5.modeling_t5  # noqa: F401 - before torchvision is stubbed: transformers asks for it
from harness import NoVae, TinyTextEncoder, checkout, in_float32, plain_attention, randomise
from masked_reference import Source
from torch import Tensor

TOKENS = 80
LAYERS, HEADS, WIDTH = 3, 2, 64
TEXT = (8, 16)


@dataclass(frozen=True)
class Repository:
    """The modules of an open checkout."""

    few_step: Any
    diffusion: Any
    attention: Any


@contextmanager
def self_forcing(name: str = "Self-Forcing", few: str = "pipeline.causal_inference") -> Iterator[Repository]:
    """Open the checkout with the real constructors ready to build tiny models."""
    assert diffusers
    with checkout(name, stubs=("torchvision", "imageio", "lmdb", "decord", "cv2", "wandb")):
        few_step = importlib.import_module(few)
        diffusion = importlib.import_module("pipeline.causal_diffusion_inference")
        causal = importlib.import_module("wan.modules.causal_model")
        in_float32(causal.attention)
        with (
            mock.patch.object(importlib.import_module("wan.modules.model"), "flash_attention", plain_attention),
            mock.patch.object(causal.CausalWanModel, "from_pretrained", classmethod(tiny_model)),
        ):
            yield Repository(few_step, diffusion, causal)


def tiny_model(cls: Any, _folder: str, **options: Any) -> Any:
    """Stand in for ``from_pretrained``: the real class, tiny and random."""
    model = cls(
        dim=WIDTH, ffn_dim=128, freq_dim=32, num_heads=HEADS, num_layers=LAYERS, text_len=TEXT[0], text_dim=TEXT[1],
        **options,
    )  # fmt: skip
    return randomise(model)


FOUR_STEPS = (1000, 750, 500, 250)
"""As in upstream's configuration."""


@dataclass(frozen=True)
class Setup:
    """A configuration: ``window`` and ``sink`` in frames (-1 = no local window), ``block`` frames per chunk.

    ``capacity`` is the number of cached frames without a local window; attention still sees 21 frames at most.
    ``steps`` are denoising steps: half of upstream's by default, to save time.
    """

    window: int = -1
    sink: int = 0
    block: int = 3
    capacity: int = 36
    independent_first: bool = False
    batch: int = 1
    steps: tuple[int, ...] = (1000, 500)

    def trace(self) -> dict[str, int]:
        """Denoiser calls of one chunk of the few-step sampler."""
        return {"first": 1, "refine": len(self.steps) - 1, "commit": 1}

    def options(self) -> SimpleNamespace:
        """The configuration object that the pipelines read."""
        kwargs = {"timestep_shift": 5.0, "local_attn_size": self.window, "sink_size": self.sink}
        return SimpleNamespace(
            model_kwargs=kwargs, denoising_step_list=list(self.steps), warp_denoising_step=True, context_noise=0,
            num_frame_per_block=self.block, independent_first_frame=self.independent_first, num_train_timestep=1000,
            timestep_shift=5.0, guidance_scale=3.0, negative_prompt="blurred",
        )  # fmt: skip

    def spared(self) -> range:
        """Sink frames."""
        return range(self.sink)


def few_step_pipeline(repository: Repository, setup: Setup) -> Any:
    """The real ``CausalInferencePipeline``."""
    pipeline = _scaled(repository.few_step.CausalInferencePipeline, setup)
    pipeline.kv_cache1, pipeline.crossattn_cache = new_cache(setup), new_text_cache(setup)
    return pipeline


def guided_pipeline(repository: Repository, setup: Setup, steps: int = 4) -> Any:
    """The real ``CausalDiffusionInferencePipeline``: guidance with two caches, several solver steps."""
    pipeline = _scaled(repository.diffusion.CausalDiffusionInferencePipeline, setup)
    pipeline.sampling_steps = steps
    pipeline.kv_cache_pos, pipeline.kv_cache_neg = new_cache(setup), new_cache(setup)
    pipeline.crossattn_cache_pos, pipeline.crossattn_cache_neg = new_text_cache(setup), new_text_cache(setup)
    return pipeline


def _scaled(constructor: Any, setup: Setup) -> Any:
    """Build a pipeline and bring the sizes that upstream writes as literals down to the tiny model's."""
    pipeline = constructor(setup.options(), "cpu", text_encoder=TinyTextEncoder(*TEXT), vae=NoVae())
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = LAYERS, TOKENS
    for block in pipeline.generator.model.blocks:
        block.self_attn.max_attention_size = (21 if setup.window == -1 else setup.window) * TOKENS
    return pipeline


def new_cache(setup: Setup) -> list[dict[str, Tensor]]:
    """An empty KV cache in upstream's form."""
    frames = setup.capacity if setup.window == -1 else setup.window
    shape = (setup.batch, frames * TOKENS, HEADS, WIDTH // HEADS)
    return [
        {
            "k": torch.zeros(shape),
            "v": torch.zeros(shape),
            "global_end_index": torch.tensor([0]),
            "local_end_index": torch.tensor([0]),
        }
        for _ in range(LAYERS)
    ]


def new_text_cache(setup: Setup) -> list[dict[str, Any]]:
    """An empty cross-attention cache in upstream's form."""
    shape = (setup.batch, TEXT[0], HEADS, WIDTH // HEADS)
    return [{"k": torch.zeros(shape), "v": torch.zeros(shape), "is_init": False} for _ in range(LAYERS)]


def source_of(repository: Repository, pipeline: Any) -> Source:
    """What the independent reference must know."""
    generator = pipeline.generator
    values = [block.self_attn.v for block in generator.model.blocks]
    return Source(generator, repository.attention, values, _start, _commits, TOKENS)


def _start(arguments: Mapping[str, Any]) -> int:
    return int(arguments["current_start"]) // TOKENS


def _commits(arguments: Mapping[str, Any]) -> bool:
    return float(arguments["timestep"].max()) == 0
