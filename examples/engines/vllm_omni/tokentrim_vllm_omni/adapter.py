"""LingBot-World 2 in vLLM-Omni (``CausalLingBotWorldTransformer3DModel``), as its DMD block runner samples from it.

Attention reads the frames that are in the window, K after RoPE, behind a sink, then the chunk's own: of a single
request out of a cache of its own, of a realtime session out of pages of a pool (``pages.py``). Either way they are
keys in a sequence, and nothing is written into a cache. Read in vLLM-Omni 0.30.0.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Adapter, Call, KeyLayout, Match, NoMatch, Patches, Segment, grid_of, hookimpl, layers_of

from .pages import PAGED, WRITE, Pages, Window

NOTHING = Window(None, (), 0)
PARAMETERS = ("hidden_states", "timestep", "camera_hidden_states", "cache", "start_frame", "update_cache")


@dataclass(frozen=True)
class Block(Call):
    """One call, with the frames that it reads."""

    window: Window = NOTHING


class VllmOmniLingBot(Adapter[Block]):
    """Give the transformer; its config tells the grid, its calls the cache."""

    name = "vllm-omni-lingbot"
    models = ("LingBot-World 2 (vLLM-Omni)",)
    context_kind = "rolling KV cache, or pages of a pool; K after RoPE"
    takes = frozenset({"judge", "hide", "commit"})
    _latest: tuple[Callable[[], Any], Window] = (lambda: None, NOTHING)
    """The latest call's cache and window: a call over pages puts its tables in the place of what tells of frames."""

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer by its forward and its self attention."""
        transformer: Any = getattr(model, "transformer", model)
        layers = layers_of(transformer, "blocks", "self_attn")
        if not layers or not all(hasattr(layer, "attn") and hasattr(layer, "ulysses_world_size") for layer in layers):
            return NoMatch("no transformer whose blocks[i].self_attn have attn and ulysses_world_size")
        if any(tokentrim.home_of(layers[0], name) is None for name in (PAGED, WRITE)):
            return NoMatch(f"the module of blocks[0].self_attn has no {PAGED} and {WRITE}", 0.5)
        if reason := tokentrim.lacks(transformer, PARAMETERS, "the transformer's forward"):
            return NoMatch(reason, 0.5)
        _, height, width = transformer.config.patch_size
        return Match(transformer, (int(height), int(width)))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap attention in the three ways that it goes: by a layer's own module, by the kernel for pages, by pages."""
        self.transformer: Any = getattr(model, "transformer", model)
        layers = layers_of(self.transformer, "blocks", "self_attn")
        if layers[0].ulysses_world_size > 1:
            words = "vLLM-Omni divides the sequence over ranks, so no rank has all rows of a frame.\nSet ulysses to 1."
            raise tokentrim.UnsupportedContextError(words)
        for layer in layers:
            patches.tap(layer.attn, "forward", q="query", k="key", v="value", refuse=("attn_metadata",))
        home = tokentrim.home_of(layers[0])
        pages = Pages(getattr(home, PAGED))
        patches.tap_packed(home, PAGED, pages.attend)
        patches.tap_packed(home, WRITE, pages.write_and_attend)

    def group(self, model: Any) -> Any:
        """The ranks that have a part of the heads each."""
        from vllm.distributed import get_tp_group

        ranks = get_tp_group()
        return ranks.cpu_group if ranks.world_size > 1 else None

    def parse(self, arguments: Mapping[str, Any]) -> Block | None:
        """Read one call; the channels of noise come first, conditions behind them."""
        config, layer = self.transformer.config, arguments["cache"].self_attention[0]
        latents: Tensor = arguments["hidden_states"][:, : config.out_channels].transpose(1, 2)
        start, per_frame = int(arguments["start_frame"]), math.prod(grid_of(latents, config.patch_size[1:]))
        known, commits = self._latest[0]() is arguments["cache"], bool(arguments["update_cache"])
        if known and hasattr(layer, "block_table"):
            window = self._latest[1]
        else:
            window = Window.of(layer, range(start, start + latents.shape[1]), per_frame, int(config.sink_size))
            self._latest = weakref.ref(arguments["cache"], self._forget), window if window.pages else NOTHING
        return Block(latents, start, window.owner, arguments["timestep"], commits, arguments, window)

    def _forget(self, _cache: Any) -> None:
        """The call is over: nothing keeps its pages."""
        self._latest = (lambda: None, NOTHING)

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """A request has a cache of its own, a session a request for pages of its own until it is reset."""
        layer = arguments["cache"].self_attention[0]
        return (getattr(layer, "adapter", getattr(layer, "value", None)),)

    def context(self, call: Block) -> KeyLayout:
        """The sink, the frames that stay in the window, the chunk's own."""
        grid = grid_of(call.latents, self.transformer.config.patch_size[1:])
        parts = (Segment(role, frames, *grid) for role, frames in call.window.parts(call.start))
        layout = KeyLayout(tuple(part for part in parts if part.frames), len(self.transformer.blocks))
        call.window.require(layout.length)
        return layout

    def prediction(self, call: Block, output: Any) -> Tensor:
        """x0 = x - sigma flow; the runner's timestep is 1000 sigma."""
        assert call.timestep is not None
        return tokentrim.x0_of_flow(output.transpose(1, 2).float(), call.latents, call.timestep / 1000)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter[Any]]]:
    """The adapter of this package."""
    return [VllmOmniLingBot]
