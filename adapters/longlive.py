"""LongLive 1.0 (NVlabs/LongLive, branch v1.0): Self-Forcing's loop with a cache that is written late, and new prompts.

Attention works on clones of the cache; what a call wrote is put into it when all layers are done, and later calls of
a chunk leave the sink alone. A prompt switch is one call that writes the frames of the whole window once more under the
new prompt. With ``use_infinite_attention`` K is kept before RoPE and placed by its row, so rows must never move.
"""

from __future__ import annotations

from torch import nn

from tokentrim_hooks import Adapter, Call, Match, NoMatch, Phase, Seen, hookimpl

from ._switches import SWITCHES
from ._wan import CausalWan, self_attentions


class LongLive(CausalWan):
    """Chunk-wise rollout of LongLive's plain, interactive and infinite pipelines; caches are new in every video."""

    name = "longlive"
    models = ("LongLive 1.0",)
    context_kind = "rolling KV cache behind a sink, K after RoPE (before RoPE with infinite attention)"
    constructors = (
        *CausalWan.constructors,
        "pipeline.interactive_causal_inference:InteractiveCausalInferencePipeline",
    )
    takes = frozenset({"judge", "hide", "commit", "correct", "settle", "guide", "weigh"})
    own = ("sink_recache_after_switch",)
    switches = SWITCHES
    remembers = False
    """Whether this is the adapter of the relative whose self attention has a ``compression_method``."""

    @classmethod
    def _probe_layers(cls, generator: nn.Module) -> Match | NoMatch:
        if not cls.remembers and any(hasattr(layer, "compression_method") for layer in self_attentions(generator)):
            return NoMatch("self attention has compression_method: this is MemRoPE")
        return super()._probe_layers(generator)

    def phase(self, call: Call, seen: Seen) -> Phase:
        """A prompt switch writes frames up to the latest committed one again, and so rebuilds the context."""
        if seen.committed and call.end == seen.end and int(call.arguments["kv_cache"][0]["global_end_index"]) > 0:
            return Phase.RECACHE
        return super().phase(call, seen)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for LongLive 1.0."""
    return [LongLive]
