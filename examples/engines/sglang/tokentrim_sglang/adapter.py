"""SGLang's causal Wan (``CausalWanTransformer3DModel``), as its ``CausalDMDDenoisingStage`` samples from it.

The KV cache is a list of ``CausalSelfAttentionKVCache``, one a layer, seen as an argument of the transformer's calls.
Rows roll left behind the sink; K lies there after RoPE. A rank of tensor parallelism may hold the memory of all heads
and write its own only: its rows are then views of those heads. Read in SGLang 0.5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks import (
    Adapter,
    CacheRows,
    Call,
    Match,
    NoMatch,
    Patches,
    Phase,
    Seen,
    default_phase,
    home_of,
    hookimpl,
    lacks,
    layers_of,
    nearest_sigma,
)

PARAMETERS = ("hidden_states", "timestep", "kv_cache", "crossattn_cache", "current_start", "start_frame")
LAYER = ("attn", "head_start", "num_heads")
FIELDS = ("k", "v", "global_end_index", "local_end_index", "sink_tokens", "global_sink_tokens", "allow_growth")
CONTEXT, SEQUENCE_PARALLEL = "get_forward_context_or_none", "get_sp_world_size"


class SGLang(Adapter):
    """Give the transformer: the stage, its scheduler and its step are read from SGLang's forward context."""

    name = "sglang"
    models = ("SGLang causal Wan2.1",)
    context_kind = "rolling KV cache, K after RoPE"
    takes = frozenset({"judge"})

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer by its forward and its ``attn1`` layers."""
        transformer: Any = getattr(model, "transformer", model)
        if reason := _refusal(transformer):
            return NoMatch(reason)
        _, height, width = transformer.patch_size
        return Match(transformer, (int(height), int(width)))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the attention module of every self-attention layer."""
        self.transformer: Any = getattr(model, "transformer", model)
        self.layers = layers_of(self.transformer, "blocks", "attn1")
        self.home = home_of(self.layers[0])
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
        if arguments["kv_cache"] is None:
            return None
        _require_known(arguments["kv_cache"])
        latents: Tensor = arguments["hidden_states"].transpose(1, 2)
        return Call(
            latents,
            start=int(arguments["current_start"]) // self._rows_per_frame(latents),
            stream=arguments["kv_cache"][0].v,
            timestep=arguments["timestep"],
            arguments=arguments,
        )

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """A session has a cache of its own, which its next video takes over."""
        cache = arguments["kv_cache"]
        return (getattr(cache[0], "v", None),) if cache else (None,)

    def phase(self, call: Call, seen: Seen) -> Phase:
        """The stage counts the steps of a chunk in its forward context; the clean call is step 0 again."""
        context = self.home.get_forward_context_or_none()
        if context is None:
            return default_phase(call, seen)
        if call.start != seen.start or seen.committed:
            return Phase.FIRST
        return Phase.COMMIT if context.current_timestep == 0 else Phase.REFINE

    def context(self, call: Call) -> CacheRows:
        """Rows before the current chunk: which are the last ones once the chunk has been written."""
        cache = call.arguments["kv_cache"]
        per_frame = self._rows_per_frame(call.latents)
        new = call.frames * per_frame
        written = _end(cache[0], "global") >= call.start * per_frame + new
        stop = max(_end(cache[0], "local") - (new if written else 0), 0)
        sinks = max(int(cache[0].sink_tokens), int(cache[0].global_sink_tokens))
        keys, values = self._own_heads(cache, "k"), self._own_heads(cache, "v")
        return CacheRows(values, 0, stop, per_frame, min(sinks, stop), keys=keys)

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 from flow, in float64 as the stage computes it."""
        assert call.timestep is not None
        sigma = self._sigma(call.timestep)
        flow = output.transpose(1, 2)
        return (call.latents.double() - sigma.view(*sigma.shape, *[1] * (5 - sigma.ndim)) * flow.double()).to(flow)

    def _sigma(self, timestep: Tensor) -> Tensor:
        """Noise levels by the request's scheduler; without one timestep / 1000."""
        request = getattr(self.home.get_forward_context_or_none(), "forward_batch", None)
        scheduler = getattr(request, "scheduler", None)
        return timestep.double() / 1000 if scheduler is None else nearest_sigma(scheduler, timestep).double()

    def _own_heads(self, cache: Sequence[Any], name: str) -> list[Tensor]:
        """K or V of every layer, of the heads that this rank writes: ``[B, rows, heads, head_dim]``."""
        rows = []
        for layer, of_layer in zip(self.layers, cache, strict=True):
            whole: Tensor = getattr(of_layer, name)
            own = slice(layer.head_start, layer.head_start + layer.num_heads)
            rows.append(whole if whole.shape[2] == layer.num_heads else whole[:, :, own])
        return rows

    def _rows_per_frame(self, latents: Tensor) -> int:
        _, height, width = self.transformer.patch_size
        return math.prod(latents.shape[-2:]) // (int(height) * int(width))


def _end(layer: Any, which: str) -> int:
    """A layer's counter of rows; its copy on the host where it keeps one."""
    on_host = getattr(layer, f"{which}_end_index_int", None)
    return int(getattr(layer, f"{which}_end_index") if on_host is None else on_host)


def _require_known(cache: Sequence[Any]) -> None:
    """Raise UnsupportedContextError for a cache whose rows follow other rules."""
    for layer in cache:
        if reason := _cache_refusal(layer):
            raise tokentrim.UnsupportedContextError(f"{reason}; nothing is pruned.\nTurn that off, or leave us out.")


def _cache_refusal(layer: Any) -> str:
    missing = [name for name in FIELDS if not hasattr(layer, name)]
    if missing:
        return f"the KV cache is a {type(layer).__name__} without {', '.join(missing)} (packed or foreign)"
    if layer.allow_growth:
        return "the KV cache may grow (allow_growth), which moves its rows to other memory"
    if int(getattr(layer, "pinned_len", 0)) > 0:
        return "the KV cache has pinned a chunk of a new scene as its sink (pinned_start), amid rows that we prune"
    return ""


def _refusal(transformer: Any) -> str:
    """Why this is not SGLang's causal Wan; empty if it is."""
    if not isinstance(transformer, nn.Module):
        return "no module, nor anything with one as .transformer"
    layers = layers_of(transformer, "blocks", "attn1")
    if not layers or not all(hasattr(layer, name) for layer in layers for name in LAYER):
        return f"the transformer has no blocks[i].attn1 with {', '.join(LAYER)}"
    if any(home_of(layers[0], name) is None for name in (CONTEXT, SEQUENCE_PARALLEL)):
        return f"the module of blocks[0].attn1 has no {CONTEXT} and {SEQUENCE_PARALLEL}"
    return lacks(transformer, PARAMETERS, "the transformer's forward")


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """The adapter of this package."""
    return [SGLang]
