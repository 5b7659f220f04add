"""Reward-Forcing: Self-Forcing's loop with a sink that absorbs, little by little, what passes through the window.

K is stored before RoPE and turned anew in every call by the order of rows: sink first, then the recent window. When the
window is full, rows of recent frames are blended into the sink (``incremental_update``, 0.001 of them per chunk). A
dead row is kept out of that blend: the sink's row stays as it was, or its mark would kill the sink's row for good.

A token that was blended in before it was pruned keeps that share, which nothing can take out again. The first call of a
chunk blends before the chunk can be judged: so too does, once, the chunk that the prune is for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks import Adapter, Patches, bind, hookimpl

from .self_forcing import SelfForcing


class RewardForcing(SelfForcing):
    """Rollout of ``CausalInferencePipeline`` with an absorbing sink."""

    name = "reward-forcing"
    models = ("Reward-Forcing",)
    context_kind = "rolling KV cache, K before RoPE, behind a blended sink"
    takes = SelfForcing.takes - {"weigh"}
    """A weight that begins with the first call of a chunk would go into the sink, as below."""
    structure = "incremental_update"
    keeps_memory = True
    """The blended sink."""
    hides_from = frozenset({"refine", "commit"})
    """The first call of a chunk blends what leaves the window into the sink; a hidden row would be missing there."""

    def attach(self, model: Any, patches: Patches) -> None:
        """As Self-Forcing; besides, keep dead rows out of every layer's sink."""
        super().attach(model, patches)
        for layer in self.layers:
            patches.wrap(layer, "incremental_update", _blend_the_living, pruned_only=True)


def _blend_the_living(
    wrapped: Any, _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Blend ``(new_k, new_v)`` into the sink's ``(k, v)``, all ``[B, rows, heads, head_dim]``, but for dead rows."""
    _, new_v, sink_k, sink_v = list(bind(wrapped, args, kwargs).values())[:4]
    blended_k, blended_v = wrapped(*args, **kwargs)
    living = new_v[:, :, :1, :1].float().isfinite()
    return torch.where(living, blended_k, sink_k), torch.where(living, blended_v, sink_v)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for Reward-Forcing."""
    return [RewardForcing]
