"""MemRoPE's real wrapper, model and pipeline around tiny random weights: 80 tokens per frame, 3 layers.

As shipped: a window of 12 frames, 3 of them a sink, blocks of 3. The fifth block is the first to evict.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from harness import NoVae, TinyTextEncoder
from tiny_longlive import Options
from tiny_rolling_forcing import rolling_forcing
from tiny_self_forcing import (
    HEADS,
    LAYERS,
    TEXT,
    TOKENS,
    WIDTH,
    Repository,
    Setup,
    new_cache,
    new_text_cache,
)

SHIPPED = Setup(window=12, sink=3)


def memrope(name: str = "MemRoPE") -> AbstractContextManager[Repository]:
    """Open the checkout with the real constructors ready to build tiny models."""
    return rolling_forcing(name, "pipeline.causal_inference")


def memrope_pipeline(repository: Repository, method: str, bare: bool = False, adaptive: bool = False) -> Any:
    """The real ``CausalInferencePipeline``; ``method`` is ``ema`` or ``eviction``.

    Its caches have the entries that it gives them, narrowed to the tiny model's heads. ``bare=True`` gives it the
    four of Self-Forcing instead, as a caller may who makes them: the model does without the others.
    """
    options = SHIPPED.options()
    options.model_kwargs = Options(
        options.model_kwargs, recent_size=4, compression_method=method, ema_adaptive=adaptive
    )
    pipeline = repository.few_step.CausalInferencePipeline(
        options, "cpu", text_encoder=TinyTextEncoder(*TEXT), vae=NoVae()
    )
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = LAYERS, TOKENS
    real = type(pipeline)._initialize_kv_cache

    def caches(self: Any, **given: Any) -> None:
        real(self, **given)
        for layer in self.kv_cache1:
            layer.update({name: _narrow(layer[name]) for name in ("k", "v", "q")})
        self.kv_cache1 = new_cache(SHIPPED) if bare else self.kv_cache1

    def text_caches(self: Any, **_: Any) -> None:
        self.crossattn_cache = new_text_cache(SHIPPED)

    # Bound, so that a deep copy fills its own.
    pipeline._initialize_kv_cache = MethodType(caches, pipeline)
    pipeline._initialize_crossattn_cache = MethodType(text_caches, pipeline)
    return pipeline


def _narrow(rows: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*rows.shape[:2], HEADS, WIDTH // HEADS)
