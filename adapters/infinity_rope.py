"""Infinity-RoPE (yesiltepe-hidir/infinity-rope): Self-Forcing's loop for videos without end, in several scenes.

K is stored before RoPE and the whole window is turned anew in every call, by the order of its rows: tokens must stay
where they are, which marks in V let them. Where a scene ends the pipeline keeps the first frame of the window, moves
the last two behind it and sets ``local_end_index`` back to three frames; marks move with the rows. A new scene is to
differ from the one before, so statistics start anew with it.
"""

from __future__ import annotations

from typing import Any

from tokentrim_hooks import Adapter, Call, hookimpl

from .self_forcing import SelfForcing


class InfinityRope(SelfForcing):
    """Rollout of ``CausalInferencePipeline``, scene changes with and without a cut included."""

    name = "infinity-rope"
    models = ("Infinity-RoPE",)
    context_kind = "rolling KV cache, K before RoPE"
    structure = "block_relativistic_rope"
    entries = (*SelfForcing.entries, "scene_cut")

    _index: Any = None
    """The first layer's ``local_end_index``, a tensor that only a new scene or a new video replaces."""

    def changes_prompt(self, call: Call) -> bool:
        """A scene begins where the cache was flushed: told by the tensor's identity, without reading the device."""
        index = call.arguments["kv_cache"][0]["local_end_index"]
        changed = index is not self._index
        self._index = index
        return changed


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for Infinity-RoPE."""
    return [InfinityRope]
