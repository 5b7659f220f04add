"""MemFlow (KlingTeam/MemFlow): LongLive's loop with a bank of old frames between the sink and the local window.

Denoising calls read the cache but do not write it; only a call with ``update_cache=True`` does. The bank ``kv_bank``
holds copies of first frames of old chunks, and is compressed by the scores of their keys against the prompt; a call
with ``q_bank=True`` moves the newest copy into it, so such a call must not be made twice. The bank is the model's
long-term memory and, like the sink, is never pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokentrim_hooks import Adapter, CacheRows, Call, Phase, Seen, hookimpl

from ._wan import OPTIONS, CausalWan


class MemFlow(CausalWan):
    """Chunk-wise rollout of MemFlow's plain and interactive pipelines; caches and bank are new in every video."""

    name = "memflow"
    models = ("MemFlow",)
    context_kind = "rolling KV cache behind a sink, K after RoPE; a memory bank that is spared"
    constructors = (
        *CausalWan.constructors,
        "pipeline.interactive_causal_inference:InteractiveCausalInferencePipeline",
        "pipeline.switch_causal_inference:SwitchCausalInferencePipeline",
    )
    takes = frozenset({"judge", "hide", "commit", "correct"})
    """Its bank keeps copies of rows, which no policy rewrites or weighs, and moves on in calls, so none looks ahead."""
    hides_from = frozenset({"first", "refine", "commit"})
    own = ("kv_bank", "q_bank", "update_cache", "is_recache")
    options = (*OPTIONS, "update_bank")
    keeps_memory = True
    """The bank."""

    def phase(self, call: Call, seen: Seen) -> Phase:
        """A prompt switch says so (``is_recache``); other calls that write the cache commit."""
        if call.arguments["is_recache"]:
            return Phase.RECACHE
        if call.arguments["update_cache"] and call.start == seen.start:
            return self.noted(Phase.COMMIT, call, seen)
        return super().phase(call, seen)

    def context(self, call: Call) -> CacheRows:
        """As the family's; sparse attention (``SMA``) picks sink frames head by head, so there no mark may sit."""
        rows = super().context(call)
        if getattr(self.layers[0], "SMA", False):
            return CacheRows(rows.values, rows.anchors, rows.stop, rows.rows_per_frame)
        return rows

    def replay(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call again, without moving the newest frame into the bank a second time."""
        return denoiser(*args, **{**kwargs, "q_bank": False})


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for MemFlow."""
    return [MemFlow]
