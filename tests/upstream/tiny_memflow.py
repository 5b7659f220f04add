"""MemFlow's real wrapper, model and pipelines around tiny random weights, at the real grid of 60 x 104 latent pixels.

Its attention has 1560 tokens per frame and 3 frames per chunk as literals, so only the width is tiny: 2 layers, 1 head.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from harness import NoVae, TinyTextEncoder, checkout, in_float32, plain_attention, randomise
from masked_reference import MaskedReference, Source
from tiny_longlive import Options
from tiny_rolling_forcing import STUBS
from tiny_self_forcing import TEXT, Repository, Setup
from torch import Tensor

GRID, TOKENS, LAYERS, WIDTH = (60, 104), 1560, 2, 32
SETUP = Setup(window=8, sink=1)


@contextmanager
def memflow(name: str = "MemFlow") -> Iterator[Repository]:
    """Open the checkout; ``diffusion`` holds the interactive pipeline."""
    with checkout(name, stubs=STUBS):
        plain = importlib.import_module("pipeline.causal_inference")
        interactive = importlib.import_module("pipeline.interactive_causal_inference")
        causal = importlib.import_module("wan.modules.causal_model")
        in_float32(causal.attention)
        with (
            mock.patch.object(importlib.import_module("wan.modules.model"), "flash_attention", plain_attention),
            mock.patch.object(causal.CausalWanModel, "from_pretrained", classmethod(_tiny)),
        ):
            yield Repository(plain, interactive, causal)


def _tiny(cls: Any, _folder: str, **options: Any) -> Any:
    model = cls(
        dim=WIDTH, ffn_dim=64, freq_dim=32, num_heads=1, num_layers=LAYERS, text_len=TEXT[0], text_dim=TEXT[1],
        **options,
    )  # fmt: skip
    return randomise(model)


def memflow_pipeline(repository: Repository, interactive: bool = False) -> Any:
    """The real pipeline; only what upstream allocates as caches of 12 heads is allocated tiny."""
    options = SETUP.options()
    options.global_sink = True
    options.model_kwargs = Options(options.model_kwargs)
    constructor = (
        repository.diffusion.InteractiveCausalInferencePipeline
        if interactive
        else repository.few_step.CausalInferencePipeline
    )
    pipeline = constructor(options, "cpu", text_encoder=TinyTextEncoder(*TEXT), vae=NoVae())
    pipeline.num_transformer_blocks = LAYERS
    pipeline._initialize_kv_cache = lambda *_, **__: setattr(pipeline, "kv_cache1", _caches(SETUP.window, "k", "v"))
    pipeline._initialize_kv_bank = lambda *_, **__: setattr(pipeline, "kv_bank1", _bank())
    pipeline._initialize_crossattn_cache = lambda *_, **__: setattr(pipeline, "crossattn_cache", _text())
    pipeline.generator.model._prepare_blockwise_causal_attn_mask = lambda **_: None
    return pipeline


def _caches(frames: int, *names: str) -> list[dict[str, Tensor]]:
    return [
        {name: torch.zeros(1, frames * TOKENS, 1, WIDTH) for name in names}
        | {name: torch.tensor([0]) for name in ("global_end_index", "local_end_index")}
        for _ in range(LAYERS)
    ]


def _bank() -> list[dict[str, Tensor]]:
    new = _caches(1, "k_new", "v_new")
    return [{**fresh, **old} for fresh, old in zip(new, _caches(3, "k", "v"), strict=True)]


def _text() -> list[dict[str, Any]]:
    shape = (1, TEXT[0], 1, WIDTH)
    return [{"k": torch.zeros(shape), "v": torch.zeros(shape), "is_init": False} for _ in range(LAYERS)]


@dataclass
class BankSpared(MaskedReference):
    """Masks nothing in the bank: it lies behind the sink, before the local window, whose length the frames tell."""

    bank_keys: int = 0

    def _dead(self, v: Tensor) -> Tensor:
        dead = super()._dead(v)
        local = min(SETUP.window, self._frame + SETUP.block) - SETUP.sink
        first, stop = SETUP.sink * TOKENS, v.shape[1] - local * TOKENS
        self.bank_keys += int(dead[:, first:stop].sum())
        dead[:, first:stop] = False
        return dead

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._active:
            return super()._attention(q, k, v, *args, **kwargs)
        return self._native(q, k, v, *args, **kwargs)


def memflow_source(repository: Repository, pipeline: Any) -> Source:
    """What the independent reference must know."""
    values = [block.self_attn.v for block in pipeline.generator.model.blocks]
    return Source(
        pipeline.generator, repository.attention, values, lambda given: int(given["current_start"]) // TOKENS,
        lambda given: bool(given.get("update_cache", False)), TOKENS,
    )  # fmt: skip
