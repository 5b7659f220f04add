"""MemRoPE (YoungRaeKim/MemRoPE): LongLive's loop with two memory frames, running means of what leaves the window.

K is stored before RoPE and placed by its row. When the window is full, the first call of a chunk evicts: the mean of
the rows that leave is written into, and later mixed a little (0.01 and 0.1) into, two frames behind the sink. A row
that is dead when it leaves is kept out of that mean, which is of the living ones, in K and V; where none lives there is
nothing to remember, and the video is refused. The memory itself is kept as the sink is.

A token that was evicted before it was pruned keeps its share, which nothing can take out again. The first call of a
chunk evicts before the chunk can be judged: so too does, once, what leaves as the chunk comes that the prune is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks import (
    Adapter,
    CacheRows,
    Call,
    Patches,
    UnsupportedContextError,
    bind,
    hookimpl,
)

from .longlive import LongLive

MEMORY = 2
"""Frames of memory."""
POSITIONS = ("token_temporal_indices", "token_spatial_indices", "original_spatial_indices", "selected_token_indices")
UNREAD = ("q", *POSITIONS, "ema_initialized")
"""Entries of a layer's cache that attention never sees."""


class MemRope(LongLive):
    """Rollout of MemRoPE's ``CausalInferencePipeline``, with its EMA memory and with plain eviction."""

    name = "memrope"
    models = ("MemRoPE",)
    context_kind = "rolling KV cache, K before RoPE, behind a sink and two frames of running means"
    takes = LongLive.takes - {"weigh"}
    """A weight that begins with the first call of a chunk would go into the memory, as below."""
    layer_attributes = (*LongLive.layer_attributes, "compression_method", "ema_adaptive")
    remembers = keeps_memory = True
    hides_from = frozenset({"refine", "commit"})
    """The first call of a chunk makes memory of what leaves; a hidden row would be missing there."""

    def attach(self, model: Any, patches: Patches) -> None:
        """As LongLive; besides, keep dead rows out of the means that every layer makes."""
        super().attach(model, patches)
        if other := {layer.compression_method for layer in self.layers} - {"ema", "eviction"}:  # a fork may have more
            raise UnsupportedContextError(
                f"compression_method={', '.join(map(repr, sorted(other)))} is not MemRoPE's, so what its "
                'memory is made of is not known.\nUse "ema" or "eviction", or write an adapter for this fork.'
            )
        if any(layer.compression_method == "ema" and layer.ema_adaptive for layer in self.layers):
            raise UnsupportedContextError(
                "ema_adaptive=True makes each token of the memory of that one in the frames that leave, if pruned, "
                "too.\nUse ema_adaptive=False, as MemRoPE's configurations do."
            )
        for layer in self.layers:
            patches.wrap(layer, "forward", self._remember_the_living, pruned_only=True)

    def require_entries(self, cache: Any) -> None:
        """As the family's, whether or not the entries are there that attention never sees."""
        known = isinstance(cache, list | tuple) and cache and isinstance(cache[0], dict)
        super().require_entries([{k: v for k, v in cache[0].items() if k not in UNREAD}] if known else cache)

    def context(self, call: Call) -> CacheRows:
        """The memory, once there is one, stands behind the sink and is kept like it."""
        rows, first = super().context(call), call.arguments["kv_cache"][0]
        memory = MEMORY * rows.rows_per_frame if first.get("ema_initialized") else 0
        return replace(rows, anchors=min(rows.anchors + memory, rows.stop))

    def _remember_the_living(self, wrapped: Any, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer on a cache in which dead rows about to leave hold the mean of those that live, in K and V."""
        given = bind(wrapped, args, kwargs)
        cache, gone = given["kv_cache"], _leaving(layer, given)
        if not gone:
            return wrapped(*args, **kwargs)
        rows = slice(gone.start, gone.stop)
        living = cache["v"][:, rows, :1, :1].float().isfinite()
        # The same rows are dead in every layer: the device is asked in the first.
        if layer is self.layers[0] and not bool(living.any(1).all()):
            raise UnsupportedContextError(
                "all rows that leave the window are pruned, so there is nothing that MemRoPE's memory could be made "
                'of.\nPrune fewer tokens or frames, or use compression_method="eviction".'
            )
        given["kv_cache"] = {**cache, **{name: _with_means(cache[name], rows, living) for name in ("k", "v")}}
        return wrapped(**{name: value for name, value in given.items() if name != "self"})


def _leaving(layer: Any, given: Mapping[str, Any]) -> range:
    """Rows that the memory is made of in this call of a layer: its oldest ones behind the memory, if it evicts.

    The counters lie on the device, and the layer itself reads them next.
    """
    cache, new = given["kv_cache"], given["x"].shape[1]
    end = given["current_start"] + new
    if cache is None or layer.compression_method != "ema" or end <= cache["k"].shape[1]:
        return range(0)
    if end <= int(cache["global_end_index"]):
        return range(0)  # the chunk has evicted before
    first = (layer.sink_size + MEMORY) * int(given["grid_sizes"][0][1:].prod())
    return range(first, first + max(int(cache["local_end_index"]) + new - cache["k"].shape[1], 0))


def _with_means(rows: Tensor, gone: slice, living: Tensor) -> Tensor:
    """``rows`` ``[B, rows, heads, head_dim]`` again, their ``gone`` ones with the mean of the ``living`` for others."""
    leaving, copy = rows[:, gone], rows.clone()
    mean = torch.where(living, leaving, 0).float().sum(1, keepdim=True) / living.sum(1, keepdim=True)
    copy[:, gone] = torch.where(living, leaving, mean.to(rows.dtype))
    return copy


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for MemRoPE."""
    return [MemRope]
