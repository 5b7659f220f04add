"""Rolling Forcing's real wrapper, model and pipeline around tiny random weights: 80 tokens per frame, 3 layers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from harness import NoVae, TinyTextEncoder, checkout, in_float32, plain_attention
from masked_reference import Source
from tiny_self_forcing import LAYERS, TEXT, TOKENS, Repository, Setup, new_cache, new_text_cache, tiny_model

BLOCK, WINDOW = 3, 5
"""Frames a block; blocks a window, one for each denoising step (both are literals upstream)."""
STEPS = (1000, 800, 600, 400, 200)
STUBS = ("torchvision", "imageio", "lmdb", "decord", "cv2", "wandb", "peft")


@contextmanager
def rolling_forcing(
    name: str = "RollingForcing", pipeline_module: str = "pipeline.rolling_forcing_inference"
) -> Iterator[Repository]:
    """Open the checkout, or one that is laid out alike, with the real constructors ready to build tiny models."""
    with checkout(name, stubs=STUBS):
        pipeline = importlib.import_module(pipeline_module)
        causal = importlib.import_module("wan.modules.causal_model")
        in_float32(causal.attention)
        with (
            mock.patch.object(importlib.import_module("wan.modules.model"), "flash_attention", plain_attention),
            mock.patch.object(causal.CausalWanModel, "from_pretrained", classmethod(tiny_model)),
        ):
            yield Repository(pipeline, None, causal)


def rolling_pipeline(repository: Repository, batch: int = 1) -> Any:
    """The real ``CausalInferencePipeline``, its literal sizes brought down to the tiny model's."""
    options = SimpleNamespace(
        model_kwargs={"timestep_shift": 5.0}, denoising_step_list=list(STEPS), warp_denoising_step=True,
        context_noise=0, num_frame_per_block=BLOCK, independent_first_frame=False,
    )  # fmt: skip
    pipeline = repository.few_step.CausalInferencePipeline(
        options, "cpu", text_encoder=TinyTextEncoder(*TEXT), vae=NoVae()
    )
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = LAYERS, TOKENS
    setup = Setup(capacity=24, batch=batch)
    pipeline.kv_cache_clean, pipeline.crossattn_cache = new_cache(setup), new_text_cache(setup)
    for block in pipeline.generator.model.blocks:
        block.self_attn.frame_length, block.self_attn.block_length = TOKENS, BLOCK * TOKENS
        block.self_attn.max_attention_size = 21 * TOKENS
    return pipeline


def source_of(repository: Repository, pipeline: Any) -> Source:
    """What the independent reference must know; a call's first frame is the window's."""
    values = [block.self_attn.v for block in pipeline.generator.model.blocks]
    return Source(pipeline.generator, repository.attention, values, _start, _commits, TOKENS)


def _start(arguments: Mapping[str, Any]) -> int:
    return int(arguments["current_start"]) // TOKENS


def _commits(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("updating_cache", False))
