"""Rolling Sink (haodong2000/RollingSink): Self-Forcing's loop whose window is filled up with the video's first frames.

Beside its cache each layer keeps ``k_original`` (before RoPE) and ``v_original`` of the frames that first filled the
window. Once it is full, a commit overwrites the rows of the chunk before with three of these frames, forwards and
backwards in turn, turned to where they stand now. So what is pruned is marked in both places: a mark comes back with
the row that it is on.
"""

from __future__ import annotations

from dataclasses import replace

from tokentrim_hooks import Adapter, CacheRows, Call, hookimpl

from .self_forcing import SelfForcing


class RollingSink(SelfForcing):
    """Rollout of ``CausalInferencePipeline``; its window needs no ``local_attn_size`` to roll."""

    name = "rolling-sink"
    models = ("Rolling Sink",)
    context_kind = "rolling KV cache, K after RoPE, filled up from a second one of the first frames, K before RoPE"
    takes = frozenset({"judge", "hide", "correct"})
    """A commit replaces the rows of the chunk before: what was rewritten or weighed there, or hidden from the commit,
    would be undone on other rows.
    """
    structure = "block_id"
    entries = (*SelfForcing.entries, "k_original", "v_original")
    keeps_memory = True
    """The first frames."""
    hides_from = frozenset({"first", "refine"})

    def context(self, call: Call) -> CacheRows:
        """As the family's, and the same rows of the first frames: those behind them never come back."""
        rows = super().context(call)
        first = [layer["v_original"] for layer in call.arguments["kv_cache"]]
        return replace(rows, values=[*rows.values, *first], keys=(), attentions=len(first))


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for Rolling Sink."""
    return [RollingSink]
