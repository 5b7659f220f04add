"""CausVid (tianweiy/CausVid): ``InferencePipeline`` with a few-step causal generator.

The generator returns x0 alone and is told ``current_start`` and ``current_end``, in tokens: both the rows of the cache
that the call writes and the place of its frames in time. The cache has room for the whole video, one dict per layer
with ``k`` (after RoPE) and ``v`` and no indices; a call reads all rows before ``current_end``. There is no sink and
nothing rolls, so tokens of earlier frames lie where they were written.

A long video is several ``inference(..., start_latents=...)`` calls that hand over their last frames and write the cache
from row 0 again. Each of them is a video of its own here: marks and statistics start anew, since none of the rows that
were pruned is read again. The frames handed over count as accepted: the next chunk is compared with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tokentrim_hooks import Adapter, CacheRows, Call, Match, NoMatch, hookimpl, lacks

from ._wan import CausalWan, self_attentions, start_of


class CausVid(CausalWan):
    """Rollout of ``InferencePipeline.inference`` and of scripts that call its generator."""

    name = "causvid"
    models = ("CausVid",)
    context_kind = "KV cache of the whole video, K after RoPE"
    constructors = ("causvid.models.wan.causal_inference:InferencePipeline",)
    takes = frozenset({"judge", "hide", "commit", "correct", "settle", "guide", "weigh"})
    own = ("current_end",)
    options = ()
    entries = ("k", "v")
    layer_attributes = ("window_size",)

    @classmethod
    def _probe_layers(cls, generator: nn.Module) -> Match | NoMatch:
        """Tell the causal generator from the teacher, which shares the wrapper, and from ring buffers."""
        for layer in self_attentions(generator):
            if hasattr(layer, "evict_idx"):
                return NoMatch("self_attn has evict_idx: the cache is a ring buffer, as in StreamDiffusionV2")
            if lacks(layer, cls.own, "self_attn"):
                return NoMatch("self_attn takes no current_end: this is CausVid's bidirectional teacher")
        return super()._probe_layers(generator)

    def context(self, call: Call) -> CacheRows:
        """All rows before ``current_start``."""
        cache: Sequence[Mapping[str, Any]] = call.arguments["kv_cache"]
        self.require_entries(cache)
        values, keys = ([layer[name] for layer in cache] for name in ("v", "k"))
        return CacheRows(values, 0, start_of(call.arguments), self.rows_per_frame(call.latents), keys=keys)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for CausVid."""
    return [CausVid]
