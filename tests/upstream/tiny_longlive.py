"""LongLive 1.0's real wrapper, models and pipelines around tiny random weights: 80 tokens per frame, 3 layers.

The checkout of branch v1.0 is looked for as ``LongLive-v1``: the main branch holds LongLive 2.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from unittest import mock

from harness import NoVae, TinyTextEncoder, checkout, in_float32, plain_attention
from tiny_rolling_forcing import STUBS
from tiny_self_forcing import LAYERS, TEXT, TOKENS, Repository, Setup, new_cache, new_text_cache, tiny_model


class Options(dict):
    """A configuration section whose keys are attributes, as OmegaConf's are."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


@contextmanager
def longlive(infinite: bool = False, name: str = "LongLive-v1") -> Iterator[Repository]:
    """Open the checkout; ``diffusion`` holds the interactive pipeline, ``attention`` the model's module."""
    with checkout(name, stubs=STUBS):
        plain = importlib.import_module("pipeline.causal_inference")
        interactive = importlib.import_module("pipeline.interactive_causal_inference")
        models = [importlib.import_module(f"wan.modules.causal_model{suffix}") for suffix in ("", "_infinity")]
        in_float32(models[0].attention)
        with (
            mock.patch.object(importlib.import_module("wan.modules.model"), "flash_attention", plain_attention),
            mock.patch.object(models[0].CausalWanModel, "from_pretrained", classmethod(tiny_model)),
            mock.patch.object(models[1].CausalWanModel, "from_pretrained", classmethod(tiny_model)),
        ):
            yield Repository(plain, interactive, models[infinite])


def longlive_pipeline(
    repository: Repository, setup: Setup, infinite: bool = False, interactive: bool = False, global_sink: bool = False
) -> Any:
    """The real ``CausalInferencePipeline`` or ``InteractiveCausalInferencePipeline``; caches are new in every video."""
    options = setup.options()
    options.global_sink = global_sink
    options.model_kwargs = Options(options.model_kwargs, use_infinite_attention=infinite)
    constructor = (
        repository.diffusion.InteractiveCausalInferencePipeline
        if interactive
        else repository.few_step.CausalInferencePipeline
    )
    vae = NoVae()
    vae.decode_to_pixel_chunk = vae.decode_to_pixel  # type: ignore[assignment]
    pipeline = constructor(options, "cpu", text_encoder=TinyTextEncoder(*TEXT), vae=vae)
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = LAYERS, TOKENS

    def caches(self: Any, *_: Any, **__: Any) -> None:
        self.kv_cache1 = new_cache(setup)

    def text_caches(self: Any, *_: Any, **__: Any) -> None:
        self.crossattn_cache = new_text_cache(setup)

    # Bound, so that a deep copy fills its own.
    pipeline._initialize_kv_cache = MethodType(caches, pipeline)
    pipeline._initialize_crossattn_cache = MethodType(text_caches, pipeline)
    return pipeline


