"""SGLang's causal Wan (``CausalWanTransformer3DModel``), as its ``CausalDMDDenoisingStage`` samples from it.

The KV cache is a list of ``CausalSelfAttentionKVCache``, one a layer, seen as an argument of the transformer's calls.
Rows roll left behind the sink; K lies there after RoPE (``cache.py``). Read in SGLang 0.5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Adapter, CacheRows, Call, Match, NoMatch, Patches, Phase, Seen, grid_of, hookimpl, layers_of

from .cache import finished_rows, refusal

PARAMETERS = ("hidden_states", "timestep", "kv_cache", "crossattn_cache", "current_start", "start_frame")
LAYER = ("attn", "head_start", "num_heads")
HOME = ("get_forward_context_or_none", "get_sp_world_size")


class SGLang(Adapter):
    """Give the transformer: the stage, its scheduler and its step are read from SGLang's forward context."""

    name = "sglang"
    models = ("SGLang causal Wan2.1",)
    context_kind = "rolling KV cache, K after RoPE"
    takes = frozenset({"judge", "hide", "commit"})

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer by its forward and its ``attn1`` layers."""
        transformer: Any = getattr(model, "transformer", model)
        layers = layers_of(transformer, "blocks", "attn1")
        if not layers or not all(hasattr(layer, name) for layer in layers for name in LAYER):
            return NoMatch(f"no transformer with blocks[i].attn1 that has {', '.join(LAYER)}")
        if any(tokentrim.home_of(layers[0], name) is None for name in HOME):
            return NoMatch(f"the module of blocks[0].attn1 has no {' and '.join(HOME)}", 0.5)
        if reason := tokentrim.lacks(transformer, PARAMETERS, "the transformer's forward"):
            return NoMatch(reason, 0.5)
        return Match(transformer, (int(transformer.patch_size[1]), int(transformer.patch_size[2])))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the attention module of every self-attention layer."""
        self.transformer: Any = getattr(model, "transformer", model)
        self.layers = layers_of(self.transformer, "blocks", "attn1")
        self.home = tokentrim.home_of(self.layers[0])
        if self.home.get_sp_world_size() > 1:
            words = "SGLang divides the sequence over ranks, so no rank has all rows of a frame.\nSet its sp size to 1."
            raise tokentrim.UnsupportedContextError(words)
        for layer in self.layers:
            patches.tap(layer.attn, "forward", refuse=("attn_mask",))

    def group(self, model: Any) -> Any:
        """The ranks that have a part of the heads each."""
        from sglang.multimodal_gen.runtime.distributed import get_tp_group

        ranks = get_tp_group()
        return ranks.cpu_group if ranks.world_size > 1 else None

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one call; one without a KV cache is training."""
        cache = arguments["kv_cache"]
        if cache is None:
            return None
        if reason := next(filter(None, map(refusal, cache)), ""):
            raise tokentrim.UnsupportedContextError(f"{reason}; nothing is pruned.\nTurn that off, or leave us out.")
        latents: Tensor = arguments["hidden_states"].transpose(1, 2)
        start = int(arguments["current_start"]) // self._rows_per_frame(latents)
        return Call(latents, start, cache[0].v, arguments["timestep"], arguments=arguments)

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """A session has a cache of its own, which its next video takes over."""
        cache = arguments["kv_cache"]
        return (getattr(cache[0], "v", None),) if cache else (None,)

    def phase(self, call: Call, seen: Seen) -> Phase:
        """The stage counts the steps of a chunk in its forward context; the clean call is step 0 again."""
        context = self.home.get_forward_context_or_none()
        if context is None:
            return tokentrim.default_phase(call, seen)
        if call.start != seen.start or seen.committed:
            return Phase.FIRST
        return Phase.COMMIT if context.current_timestep == 0 else Phase.REFINE

    def context(self, call: Call) -> CacheRows:
        """Rows before the current chunk: which are the last ones once the chunk has been written."""
        return finished_rows(call, self.layers, self._rows_per_frame(call.latents))

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 from flow; noise levels by the request's scheduler, without one timestep / 1000."""
        assert call.timestep is not None
        request = getattr(self.home.get_forward_context_or_none(), "forward_batch", None)
        scheduler = getattr(request, "scheduler", None)
        sigma = call.timestep / 1000 if scheduler is None else tokentrim.nearest_sigma(scheduler, call.timestep)
        return tokentrim.x0_of_flow(output.transpose(1, 2), call.latents, sigma)

    def _rows_per_frame(self, latents: Tensor) -> int:
        return math.prod(grid_of(latents, self.transformer.patch_size[1:]))


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """The adapter of this package."""
    return [SGLang]
