"""ComfyUI's AR video model (``comfy/ldm/wan/ar_model.py``), as its sampler ``ar_video`` drives it.

The sampler's cache holds K (after RoPE) and V ``[B, rows, heads, head_dim]`` of the whole video, a dict per layer;
a call moves its ``end`` on and the sampler moves it back. Watched is ``BaseModel._apply_model``, which answers with x0.
Read in ComfyUI 0.27.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import (
    Adapter,
    CacheRows,
    Call,
    Match,
    Method,
    NoMatch,
    Patches,
    Phase,
    Seen,
    default_phase,
    hookimpl,
)


class ComfyAR(Adapter):
    """Give the MODEL (a ModelPatcher) whose sampling is watched, or the BaseModel in it for all that share it."""

    name = "comfyui-ar"
    models = ("ComfyUI's AR video model (Self-Forcing, Causal Forcing)",)
    context_kind = "KV cache of the whole video, K after RoPE"
    takes = frozenset({"judge", "hide", "commit", "correct", "settle", "weigh"})

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the diffusion model by its caches and self attention, inside what ComfyUI wraps around it."""
        base = getattr(model, "model", model)
        diffusion = getattr(base, "diffusion_model", None)
        if diffusion is None or not callable(getattr(base, "_apply_model", None)):
            return NoMatch("no ComfyUI model: it has no diffusion_model and _apply_model")
        if isinstance(getattr(base, "pipeline", None), dict):
            words = "a model of WanVideoWrapper, whose own sampler keeps no cache of finished frames"
            return NoMatch(f"{words}: use ComfyUI's loader and 'Sampler AR Video'", 0.5)
        if reason := _lacking(diffusion):
            return NoMatch(reason, 0.5)
        return Match(Method(base, "_apply_model"), (int(diffusion.patch_size[1]), int(diffusion.patch_size[2])))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap ``optimized_attention`` where self attention calls it: cross attention shares the function."""
        self.patcher = model if hasattr(model, "model") else None
        layers = tokentrim.layers_of(getattr(model, "model", model).diffusion_model, "blocks", "self_attn")
        home = tokentrim.home_of(layers[0])
        q, k, v = tokentrim.parameters_of(home.optimized_attention)[:3]  # their names depend on the kernel chosen
        patches.tap(home, "optimized_attention", q=q, k=k, v=v, heads="heads", refuse=("mask",), within=layers)

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one call; one without the sampler's cache (another sampler) or of another MODEL is none of ours."""
        cache, running = _cache_of(arguments), getattr(arguments["self"], "current_patcher", None)
        if cache is None or (self.patcher is not None and running not in (None, self.patcher)):
            return None
        if odd := set(cache[0]) ^ {"k", "v", "end"}:
            words = f"the KV cache differs from ComfyUI's in {', '.join(sorted(map(str, odd)))}; nothing is pruned"
            raise tokentrim.UnsupportedContextError(f"{words}.\nUse the core's model and its sampler ar_video.")
        latents: Tensor = arguments["x"].transpose(1, 2)
        start = int(arguments["transformer_options"]["ar_state"]["start_frame"])
        return Call(latents, start, cache[0]["v"], arguments["t"], arguments=arguments)

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Every sampling has a cache of its own."""
        cache = _cache_of(arguments)
        return (cache[0]["v"],) if cache else ()

    def phase(self, call: Call, seen: Seen) -> Phase:
        """The sampler makes one call a sigma but the last one, then commits; an image that is given comes in one."""
        steps = self.steps(call)
        if steps is None:
            return default_phase(call, seen)
        if call.start != seen.start or seen.committed:
            return Phase.FIRST
        return Phase.COMMIT if seen.steps >= steps else Phase.REFINE

    def steps(self, call: Call) -> int | None:
        """By the sigmas that ComfyUI hands to every call; their number lies on the host."""
        sigmas = call.arguments["transformer_options"].get("sample_sigmas")
        return None if sigmas is None else len(sigmas) - 1

    def context(self, call: Call) -> CacheRows:
        """All rows before the chunk's first frame: nothing rolls, and there is no sink."""
        cache, per_frame = _cache_of(call.arguments), _rows_per_frame(call.latents)
        values, keys = ([layer[name] for layer in cache] for name in ("v", "k"))
        return CacheRows(values, 0, call.start * per_frame, per_frame, keys=keys)

    def replay(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call again, from the row that the sampler had set."""
        arguments = tokentrim.bind(denoiser, args, kwargs)
        rows = arguments["x"].shape[2] * _rows_per_frame(arguments["x"])
        for layer in _cache_of(arguments):
            layer["end"] -= rows
        return denoiser(*args, **kwargs)

    def prediction(self, call: Call, output: Any) -> Tensor:
        """ComfyUI has made x0 of the model's flow."""
        x0: Tensor = output.transpose(1, 2)
        return x0

    def with_prediction(self, call: Call, output: Any, x0: Tensor) -> Any:
        """The sampler goes on with x0 alone."""
        return x0.transpose(1, 2)

    def carry(self, call: Call, before: Tensor, after: Tensor) -> Tensor:
        """The sampler re-noises x0: x = (1 - sigma) x0 + sigma noise, so keep the noise and move x0."""
        sigma = call.arguments["t"].view(-1, 1, 1, 1, 1)
        return call.latents + (1 - sigma) * (after - before)

    def with_latents(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``x`` is the first argument, frames behind channels."""
        moved = latents.transpose(1, 2)
        return (args, {**kwargs, "x": moved}) if "x" in kwargs else ((moved, *args[1:]), kwargs)


def _cache_of(arguments: Mapping[str, Any]) -> Any:
    state = arguments["transformer_options"].get("ar_state")
    return None if state is None else state["kv_caches"]


def _rows_per_frame(latents: Tensor) -> int:
    """Of latents ``[..., H, W]``, which ComfyUI pads to whole tokens of 2 x 2."""
    height, width = latents.shape[-2:]
    return -(-height // 2) * -(-width // 2)


def _lacking(diffusion: Any) -> str:
    """Why this is not the AR model; empty if it is."""
    layers = tokentrim.layers_of(diffusion, "blocks", "self_attn")
    if not layers or not tokentrim.home_of(layers[0], "optimized_attention"):
        return "the diffusion model has no blocks[i].self_attn that calls ComfyUI's optimized_attention"
    if not callable(getattr(diffusion, "init_kv_caches", None)):
        return "the diffusion model has no init_kv_caches: it is no AR model, which alone keeps finished frames"
    return tokentrim.lacks(layers[0], ("kv_cache", "freqs"), "its self attention's forward")


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """The adapter of this package."""
    return [ComfyAR]
