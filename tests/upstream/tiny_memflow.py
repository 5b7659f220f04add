"""MemFlow's real wrapper, model and pipelines around tiny random weights, at the real grid of 60 x 104 latent pixels.

Its attention has 1560 tokens per frame and 3 frames per chunk as literals, so only the width is tiny: 2 layers, 1 head.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any
from unittest import mock

import torch
from harness import NoVae, TinyTextEncoder, checkout, in_float32, plain_attention, randomise
from masked_reference import MaskedReference, Source
from tiny_forks import rescaled
from tiny_longlive import Options
from tiny_rolling_forcing import STUBS
from tiny_self_forcing import TEXT, Repository, Setup
from torch import Tensor

GRID, TOKENS, LAYERS, WIDTH = (60, 104), 1560, 2, 32
SETUP = Setup(window=8, sink=1)
HEADS = 1
"""Of the model as it is made next, and of its caches."""
SMALL = 80
"""Tokens of a frame of 16 x 20 latent pixels."""


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
        dim=WIDTH, ffn_dim=64, freq_dim=32, num_heads=HEADS, num_layers=LAYERS, text_len=TEXT[0], text_dim=TEXT[1],
        **options,
    )  # fmt: skip
    return randomise(model)


@contextmanager
def small_frames() -> Iterator[Repository]:
    """The checkout with frames of SMALL tokens: its literals are brought down in every method of the model's module."""
    with memflow() as repository, ExitStack() as more:
        for kind in vars(repository.attention).values():
            if isinstance(kind, type) and kind.__module__ == repository.attention.__name__:
                for method in filter(inspect.isfunction, vars(kind).values()):
                    more.enter_context(rescaled(method, (1, 3, 21)))
        yield repository


def memflow_pipeline(repository: Repository, interactive: bool = False, tokens: int = TOKENS) -> Any:
    """The real pipeline; only what upstream allocates as caches of 12 heads is allocated tiny.

    ``tokens`` other than TOKENS need :func:`small_frames`.
    """
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
    pipeline.frame_seq_length = tokens
    new = {"kv_cache": ("kv_cache1", lambda: _caches(SETUP.window * tokens, "k", "v")),
           "kv_bank": ("kv_bank1", lambda: _bank(tokens)), "crossattn_cache": ("crossattn_cache", _text)}  # fmt: skip
    for what, (name, make) in new.items():
        setattr(pipeline, f"_initialize_{what}", MethodType(_filling(name, make), pipeline))
    pipeline.generator.model._prepare_blockwise_causal_attn_mask = lambda **_: None
    return pipeline


def _filling(name: str, make: Callable[[], Any]) -> Callable[..., None]:
    """A method that sets an attribute of its own pipeline anew, of a deep copy's too."""
    return lambda self, *_, **__: setattr(self, name, make())


def _caches(rows: int, *names: str) -> list[dict[str, Tensor]]:
    return [
        {name: torch.zeros(1, rows, HEADS, WIDTH // HEADS) for name in names}
        | {name: torch.tensor([0]) for name in ("global_end_index", "local_end_index")}
        for _ in range(LAYERS)
    ]


def _bank(tokens: int) -> list[dict[str, Tensor]]:
    new = _caches(tokens, "k_new", "v_new")
    return [{**fresh, **old} for fresh, old in zip(new, _caches(3 * tokens, "k", "v"), strict=True)]


def _text() -> list[dict[str, Any]]:
    shape = (1, TEXT[0], HEADS, WIDTH // HEADS)
    return [{"k": torch.zeros(shape), "v": torch.zeros(shape), "is_init": False} for _ in range(LAYERS)]


@dataclass
class BankSpared(MaskedReference):
    """Masks nothing in the bank: it lies behind the sink, before the local window, whose length the frames tell."""

    bank_keys: int = 0

    def _dead(self, v: Tensor) -> Tensor:
        dead = super()._dead(v)
        local = min(SETUP.window, self._frame + SETUP.block) - SETUP.sink
        tokens = self.source.tokens
        first, stop = SETUP.sink * tokens, v.shape[1] - local * tokens
        self.bank_keys += int(dead[:, first:stop].sum())
        dead[:, first:stop] = False
        return dead

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._active:
            return super()._attention(q, k, v, *args, **kwargs)
        return self._native(q, k, v, *args, **kwargs)


def memflow_source(repository: Repository, pipeline: Any, tokens: int = TOKENS) -> Source:
    """What the independent reference must know."""
    values = [block.self_attn.v for block in pipeline.generator.model.blocks]
    return Source(
        pipeline.generator, repository.attention, values, lambda given: int(given["current_start"]) // tokens,
        lambda given: bool(given.get("update_cache", False)), tokens,
    )  # fmt: skip
