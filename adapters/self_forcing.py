"""Self-Forcing (guandeh17/Self-Forcing) and samplers that call its generator wrapper in the same way.

The sampler calls ``generator(noisy_image_or_video, conditional_dict, timestep, kv_cache, crossattn_cache,
current_start)`` several times a chunk, then once more with the finished chunk at timestep 0 to write clean context.
The cache is a list of dicts, one a layer, with K stored after RoPE; rows of older frames roll left when the window is
full, behind a fixed prefix of sink frames. ``current_start`` counts tokens.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from tokentrim_hooks import Adapter, CacheRows, Call, Match, NoMatch, Patches, hookimpl

PARAMETERS = ("noisy_image_or_video", "conditional_dict", "timestep", "kv_cache", "crossattn_cache", "current_start")
FOREIGN = {
    "updating_cache": "Rolling Forcing",
    "sink_recache_after_switch": "LongLive",
    "kv_bank": "MemFlow",
    "current_end": "CausVid",
}
"""Parameters of the wrapper that betray a relative whose cache follows other rules."""


class SelfForcing(Adapter):
    """Chunk-wise KV-cache rollout of ``CausalInferencePipeline`` and of scripts that write that loop themselves."""

    name = "self-forcing"
    models = ("Self-Forcing", "Causal-Forcing", "tokentrim reference model")
    context_kind = "rolling KV cache, K after RoPE"

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the generator wrapper, given itself or as a pipeline's ``generator``."""
        generator = getattr(model, "generator", model)
        if not isinstance(generator, nn.Module):
            return NoMatch("neither a module nor a pipeline with a .generator module")
        parameters = inspect.signature(generator.forward).parameters
        missing = [name for name in PARAMETERS if name not in parameters]
        if missing:
            return NoMatch(f"the generator's forward lacks {', '.join(missing)}")
        for name, relative in FOREIGN.items():
            if name in parameters:
                return NoMatch(f"the generator's forward takes {name!r}: this is {relative}")
        return cls._probe_layers(generator)

    @classmethod
    def _probe_layers(cls, generator: nn.Module) -> Match | NoMatch:
        patch = getattr(getattr(generator, "model", None), "patch_size", None)
        layers = _self_attentions(generator)
        if not layers or patch is None:
            return NoMatch("generator.model has no blocks[i].self_attn or no patch_size")
        if not all(hasattr(layer, "sink_size") and hasattr(layer, "local_attn_size") for layer in layers):
            return NoMatch("self_attn has no sink_size and local_attn_size")
        if not callable(getattr(_home(layers[0]), "attention", None)):
            return NoMatch("the module of self_attn has no global function attention(q, k, v)")
        return Match(generator, (int(patch[1]), int(patch[2])))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the module-global ``attention``, which only self attention calls."""
        self.generator: nn.Module = getattr(model, "generator", model)
        self.layers = _self_attentions(self.generator)
        for home in {id(_home(layer)): _home(layer) for layer in self.layers}.values():
            patches.tap(home, "attention", refuse=("q_lens", "k_lens"))

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one generator call; calls without a KV cache are training or scoring, not a rollout."""
        if arguments["kv_cache"] is None:
            return None
        latents: Tensor = arguments["noisy_image_or_video"]
        return Call(
            latents,
            start=int(arguments["current_start"] or 0) // self._tokens(latents),
            stream=id(arguments["kv_cache"]),
            timestep=arguments["timestep"],
            arguments=arguments,
        )

    def context(self, call: Call) -> CacheRows:
        """Rows before the current chunk: which are the last ones once the chunk has been written."""
        cache: Sequence[Mapping[str, Any]] = call.arguments["kv_cache"]
        tokens = self._tokens(call.latents)
        new = call.frames * tokens
        written = int(cache[0]["global_end_index"]) >= int(call.arguments["current_start"] or 0) + new
        stop = int(cache[0]["local_end_index"]) - (new if written else 0)
        anchors = min(int(self.layers[0].sink_size) * tokens, max(stop, 0))  # type: ignore[arg-type]
        return CacheRows([layer["v"] for layer in cache], 0, max(stop, 0), tokens, anchors)

    def carry(self, call: Call, before: Tensor, after: Tensor) -> Tensor:
        """The few-step sampler re-noises x0: x_t = (1 - sigma) x0 + sigma noise, so keep the noise and move x0."""
        assert call.timestep is not None
        scheduler: Any = self.generator.scheduler
        sigmas, timesteps = (t.to(call.latents.device).double() for t in (scheduler.sigmas, scheduler.timesteps))
        nearest = (timesteps[:, None] - call.timestep.flatten()[None].double()).abs().argmin(0)
        sigma = sigmas[nearest].view(*call.timestep.shape, 1, 1, 1)
        moved = call.latents.double() + (1 - sigma) * (after.double() - before.double())
        return cast(Tensor, moved.to(call.latents.dtype))

    def _tokens(self, latents: Tensor) -> int:
        patch: Sequence[int] = self.generator.model.patch_size  # type: ignore[union-attr, assignment]
        return math.prod(latents.shape[-2:]) // (int(patch[1]) * int(patch[2]))


def _self_attentions(generator: nn.Module) -> list[nn.Module]:
    blocks = getattr(getattr(generator, "model", None), "blocks", ())
    return [block.self_attn for block in blocks if isinstance(getattr(block, "self_attn", None), nn.Module)]


def _home(layer: nn.Module) -> Any:
    return sys.modules.get(type(layer).__module__)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for Self-Forcing."""
    return [SelfForcing]
