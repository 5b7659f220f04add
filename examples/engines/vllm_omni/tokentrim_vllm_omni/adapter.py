"""LingBot-World 2 in vLLM-Omni (``CausalLingBotWorldTransformer3DModel``), as its DMD block runner samples from it.

A request's cache has one ``LingBotAttentionCache`` per layer, K after RoPE, behind a sink. Denoising calls write
nothing: attention reads a copy of the rows that stay in the window, then the chunk's own. The commit makes that copy
the cache.
Read in vLLM-Omni 0.30.0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Adapter, CacheRows, Call, Match, NoMatch, Patches, hookimpl, lacks, layers_of

PARAMETERS = ("hidden_states", "timestep", "camera_hidden_states", "cache", "start_frame", "update_cache")
PAGED = "ar_diffusion_paged_attention"
FIELDS = ("key", "value", "end", "last_start", "sink_end")


class VllmOmniLingBot(Adapter):
    """Give the transformer; its config tells the window, its calls the cache."""

    name = "vllm-omni-lingbot"
    models = ("LingBot-World 2 (vLLM-Omni)",)
    context_kind = "rolling KV cache, K after RoPE"
    takes = frozenset({"judge", "hide", "commit"})

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer by its forward and its self attention."""
        transformer: Any = getattr(model, "transformer", model)
        if not isinstance(transformer, nn.Module):
            return NoMatch("no module, nor anything with one as .transformer")
        layers = layers_of(transformer, "blocks", "self_attn")
        if not layers or not all(hasattr(layer, "attn") and hasattr(layer, "ulysses_world_size") for layer in layers):
            return NoMatch("the transformer has no blocks[i].self_attn with attn and ulysses_world_size")
        if tokentrim.home_of(layers[0], PAGED) is None:
            return NoMatch(f"the module of blocks[0].self_attn has no {PAGED}", 0.5)
        if reason := lacks(transformer, PARAMETERS, "the transformer's forward"):
            return NoMatch(reason, 0.5)
        _, height, width = transformer.config.patch_size
        return Match(transformer, (int(height), int(width)))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the attention module of every self-attention layer."""
        self.transformer: Any = getattr(model, "transformer", model)
        layers = layers_of(self.transformer, "blocks", "self_attn")
        if layers[0].ulysses_world_size > 1:
            words = "vLLM-Omni divides the sequence over ranks, so no rank has all rows of a frame.\nSet ulysses to 1."
            raise tokentrim.UnsupportedContextError(words)
        for layer in layers:
            patches.tap(layer.attn, "forward", q="query", k="key", v="value", refuse=("attn_metadata",))
        self.attn: Any = layers[0].attn
        patches.wrap(tokentrim.home_of(layers[0]), PAGED, self._unpaged, pruned_only=True)

    def _unpaged(self, _paged: Any, _instance: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        """On CUDA one kernel reads the rows in blocks, of which none can be left out: go by the layers' own attention.

        They are all alike.
        """
        query, keys, values = args
        return self.attn(query, keys.flatten(0, 1)[None], values.flatten(0, 1)[None])

    def group(self, model: Any) -> Any:
        """The ranks that have a part of the heads each."""
        from vllm.distributed import get_tp_group

        ranks = get_tp_group()
        return ranks.cpu_group if ranks.world_size > 1 else None

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one call; the 16 channels of noise come first, conditions behind them."""
        layer = arguments["cache"].self_attention[0]
        if missing := [name for name in FIELDS if not hasattr(layer, name)]:
            raise tokentrim.UnsupportedContextError(
                f"the KV cache is a {type(layer).__name__} without {', '.join(missing)} (a session's pages), so "
                "nothing is pruned.\nLeave the plugin out of realtime sessions, or send single requests."
            )
        given: Tensor = arguments["hidden_states"][:, : self.transformer.config.out_channels]
        commits, start = bool(arguments["update_cache"]), int(arguments["start_frame"])
        return Call(given.transpose(1, 2), start, layer.value, arguments["timestep"], commits, arguments)

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Every request has a cache of its own."""
        return (getattr(arguments["cache"].self_attention[0], "value", None),)

    def context(self, call: Call) -> CacheRows:
        """Rows before the chunk; those that leave the window with it are no longer read."""
        cache = call.arguments["cache"].self_attention
        per_frame, first = self._rows_per_frame(call.latents), cache[0]
        new, start = call.frames * per_frame, call.start * per_frame
        written = first.last_start == start
        stop = max(first.end - (new if written else 0), 0)
        sink = min(first.sink_end, stop)
        coming = max(0, min(new, self.transformer.config.sink_size * per_frame - start))
        room = first.value.shape[1] - first.sink_end - coming - (new - coming)
        gone = 0 if written else max(stop - first.sink_end - room, 0)
        keys, values = ([getattr(layer, name) for layer in cache] for name in ("key", "value"))
        leaving = (sink, sink + gone)
        return CacheRows(values, 0, stop, per_frame, sink, current=leaving, keys=keys)

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 = x - sigma flow; the runner's timestep is 1000 sigma."""
        assert call.timestep is not None
        sigma = (call.timestep.double() / 1000).view(-1, 1, 1, 1, 1)
        flow: Tensor = output.transpose(1, 2)
        return (call.latents.double() - sigma * flow.double()).float()

    def _rows_per_frame(self, latents: Tensor) -> int:
        _, height, width = self.transformer.config.patch_size
        return math.prod(latents.shape[-2:]) // (int(height) * int(width))


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """The adapter of this package."""
    return [VllmOmniLingBot]
