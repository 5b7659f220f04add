"""Matrix-Game 2 (SkyworkAI/Matrix-Game): Self-Forcing's loop under mouse and keyboard.

Beside the KV cache, layers with an action module keep one of the mouse, in which every site attends over its own past:
``[B * tokens, frames, heads, head_dim]``, made of the tokens' features and of how the mouse moved. It rolls in step
with the other, so what is pruned is marked in both. That of the keyboard is made of what was typed alone, and is left
as it is; one function reads both.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Adapter, CacheRows, Call, Patches, home_of, hookimpl, layers_of, shares_storage

from ._channels_first import ChannelsFirst

_mouse: ContextVar[Any] = ContextVar("mouse", default=None)
"""V of the mouse in the action module that is at work."""


class MatrixGame2(ChannelsFirst):
    """Rollout of ``CausalInferencePipeline`` and of the streaming one, one video a call."""

    name, models = "matrix-game-2", ("Matrix-Game 2",)
    context_kind = "rolling KV cache, K after RoPE; beside it one per site, of the mouse"
    constructors = (
        "pipeline.causal_inference:CausalInferencePipeline",
        "pipeline.causal_inference:CausalInferenceStreamingPipeline",
    )
    takes = frozenset({"judge", "hide", "commit", "correct", "guide"})
    own = ("kv_cache_mouse", "kv_cache_keyboard")
    keeps_memory = True
    """The keyboard's."""

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap self attention, and of the function of action modules the calls that read the mouse."""
        super().attach(model, patches)
        actions = layers_of(self.generator, "model.blocks", "action_model")
        if actions and any(layer.sink_size for layer in self.layers):
            raise tokentrim.UnsupportedContextError(
                "with sink_size above 0 the cache keeps frames that the mouse's has dropped, so their rows differ.\n"
                "Use sink_size=0, as Matrix-Game 2's configurations do."
            )
        for home in dict.fromkeys(map(home_of, actions)):
            owner = home.flash_attn_interface if home.FLASH_ATTN_3_AVAILABLE else home
            patches.tap(owner, "flash_attn_func", only=_reads_the_mouse)
        for action in actions:
            patches.wrap(action, "forward", _with_mouse, pruned_only=True)

    def context(self, call: Call) -> CacheRows:
        """As the family's, and the same rows of the mouse, by site, of the layers that read it."""
        rows, given = super().context(call), call.arguments
        blocks = self.generator.model.blocks if given["conditional_dict"].get("mouse_cond") is not None else ()
        reads = [getattr(block.action_model, "enable_mouse", False) for block in blocks]
        mice = [layer["v"] for layer, read in zip(given["kv_cache_mouse"] or (), reads, strict=False) if read]
        sites = [v.unflatten(0, (-1, rows.rows_per_frame)).transpose(1, 2) for v in mice]
        return replace(rows, values=[*rows.values, *sites], keys=())


def _with_mouse(wrapped: Any, _action: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    before, values = _mouse.get(), (tokentrim.bind(wrapped, args, kwargs)["kv_cache_mouse"] or {}).get("v")
    try:
        # Ctrl-C may come behind this, so it is undone from here on.
        _mouse.set(values)
        return wrapped(*args, **kwargs)
    finally:
        _mouse.set(before)


def _reads_the_mouse(values: Tensor) -> bool:
    return shares_storage(values, _mouse.get())


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for Matrix-Game 2."""
    return [MatrixGame2]
