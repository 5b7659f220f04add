"""What SGLang's ``CausalSelfAttentionKVCache`` holds of a layer: which rows are finished, and of which heads.

A rank of tensor parallelism may hold the memory of all heads and write its own only. Read in SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokentrim_hooks import CacheRows, Call

FIELDS = ("k", "v", "global_end_index", "local_end_index", "sink_tokens", "global_sink_tokens", "allow_growth")


def refusal(layer: Any) -> str:
    """Why the rows of a layer's cache follow other rules; empty if they do not."""
    missing = [name for name in FIELDS if not hasattr(layer, name)]
    if missing:
        return f"the KV cache is a {type(layer).__name__} without {', '.join(missing)} (packed or foreign)"
    if layer.allow_growth:
        return "the KV cache may grow (allow_growth), which moves its rows to other memory"
    if int(getattr(layer, "pinned_len", 0)) > 0:
        return "the KV cache has pinned a chunk of a new scene as its sink (pinned_start), amid rows that we prune"
    return ""


def finished_rows(call: Call, layers: Sequence[Any], per_frame: int) -> CacheRows:
    """Rows before the chunk of ``call``: which are the last ones once the call has written it; ``layers`` attend."""
    caches, new = call.arguments["kv_cache"], call.frames * per_frame
    held = caches[0]
    written = _end(held, "global") >= call.start * per_frame + new
    stop = max(_end(held, "local") - (new if written else 0), 0)
    sinks = min(max(int(held.sink_tokens), int(held.global_sink_tokens)), stop)
    keys, values = ([*map(_own_heads, layers, caches, name * len(caches))] for name in "kv")
    return CacheRows(values, 0, stop, per_frame, sinks, keys=keys)


def _own_heads(layer: Any, cache: Any, name: str) -> Tensor:
    """K or V of a layer, of the heads that this rank writes: ``[B, rows, heads, head_dim]``."""
    whole: Tensor = getattr(cache, name)
    own = slice(layer.head_start, layer.head_start + layer.num_heads)
    return whole if whole.shape[2] == layer.num_heads else whole[:, :, own]


def _end(layer: Any, which: str) -> int:
    """A layer's counter of rows; its copy on the host where it keeps one."""
    on_host = getattr(layer, f"{which}_end_index_int", None)
    return int(getattr(layer, f"{which}_end_index") if on_host is None else on_host)
