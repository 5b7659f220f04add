"""FastVideo's causal Wan (``CausalWanTransformer3DModel``), as its causal stages sample from it.

The stage keeps the KV cache in a local variable: it is seen only as an argument of the transformer's calls, several per
chunk and then one with the finished chunk. Wan2.2 has two transformers (high and low noise), each with its own cache.
Rows roll left behind the sink frames. With ``rope_cache_policy`` "absolute" the cache holds roped K; with
"relativistic" raw K, roped anew by its place in the window at every call. Either way K is roped before it reaches the
attention module ``attn1.attn``, so dead rows may be left out there.

The transformer predicts flow: x0 = x_t - sigma * flow, with sigma looked up in the scheduler as the stage does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks import (
    Adapter,
    CacheRows,
    Call,
    Match,
    NoMatch,
    Patches,
    Phase,
    Seen,
    bind,
    home_of,
    hookimpl,
    lacks,
    layers_of,
    parameters_of,
)

from ._flow_stage import sigma_of, stage_of, x0_of
from ._wan import history_rows, rows_per_frame, values_of

PARAMETERS = ("hidden_states", "timestep", "kv_cache", "crossattn_cache", "current_start", "start_frame")
FOREIGN = ("kv_cache_mouse", "kv_cache_keyboard")
"""Parameters of Matrix-Game 2, whose action caches follow other rules."""
POLICIES = ("absolute", "relativistic")


class FastVideo(Adapter):
    """Causal Wan in FastVideo: give the composed pipeline, its causal denoising stage, or the bare transformer.

    Only a pipeline or stage shows the second transformer of Wan2.2 and the scheduler; without a scheduler sigma is
    timestep / 1000. The whole-chunk probe is refused: the stage turns flow into x0 with its own noisy latents.
    """

    name = "fastvideo"
    models = ("FastVideo causal Wan2.1", "FastVideo causal Wan2.2 (two transformers)")
    context_kind = "rolling KV cache, K after RoPE (absolute) or before it (relativistic)"
    takes = frozenset({"judge"})
    """Its rows roll as Self-Forcing's do, but no other hook was tried on its real code yet: none is declared."""
    constructors = ("fastvideo.pipelines.stages.causal_denoising:CausalDMDDenosingStage",)

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer by its cached forward and its ``attn1`` layers."""
        stage = stage_of(model, _refusal)
        first, second = getattr(stage, "transformer", stage), getattr(stage, "transformer_2", None)
        transformers = [first] if second is None else [first, second]
        for transformer in transformers:
            reason = _refusal(transformer)
            if reason:
                return NoMatch(reason, _nearness(transformer))
        _, height, width = first.patch_size
        return Match(first, (int(height), int(width)), also=tuple(transformers[1:]))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the attention module of every self-attention layer, in all transformers."""
        self.stage = stage = stage_of(model, _refusal)
        self.transformer: Any = getattr(stage, "transformer", stage)
        for transformer in (self.transformer, getattr(stage, "transformer_2", None)):
            for layer in _self_attentions(transformer):
                patches.tap(layer.attn, "forward", refuse=("freqs_cis",))

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one call: the transformer's forward passes everything on to its cached forward."""
        if arguments["kwargs"].get("kv_cache") is None:
            return None
        given = bind(self.transformer._forward_inference, arguments["args"], arguments["kwargs"])
        latents: Tensor = given["hidden_states"].transpose(1, 2)
        return Call(
            latents,
            start=int(given["current_start"]) // rows_per_frame(self.transformer, latents),
            stream=values_of(given["kv_cache"]),
            timestep=given["timestep"],
            arguments=given,
        )

    def phase(self, call: Call, seen: Seen) -> Phase:
        """The stage counts the steps of a chunk in its forward context, on the host; the clean call is step 0 again."""
        if call.start != seen.start or seen.committed:
            return Phase.FIRST
        step = home_of(self.transformer).get_forward_context().current_timestep
        return Phase.COMMIT if step == 0 else Phase.REFINE

    def context(self, call: Call) -> CacheRows:
        """Rows before the current chunk: which are the last ones once the chunk has been written."""
        per_frame = rows_per_frame(self.transformer, call.latents)
        sinks = int(self.transformer.blocks[0].attn1.sink_size) * per_frame
        return history_rows(call.arguments, call.frames * per_frame, per_frame, sinks)

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 from flow, in float64 as the stage computes it."""
        assert call.timestep is not None
        return x0_of(output.transpose(1, 2), call.latents, sigma_of(self.stage, call.timestep))


def _refusal(transformer: Any) -> str:
    """Why this is not a causal Wan of FastVideo; empty if it is."""
    cached = getattr(transformer, "_forward_inference", None)
    if not isinstance(transformer, nn.Module) or not callable(cached):
        return "no module with a _forward_inference, nor a stage or pipeline that has one as .transformer"
    foreign = [name for name in FOREIGN if name in parameters_of(cached)]
    if foreign:
        return f"the transformer's _forward_inference takes {', '.join(foreign)}: a relative with other caches"
    return lacks(cached, PARAMETERS, "the transformer's _forward_inference") or _layer_refusal(transformer)


def _nearness(transformer: Any) -> float:
    """How much of a causal Wan of FastVideo is there, 0 to 1."""
    taken = parameters_of(getattr(transformer, "_forward_inference", None))
    layers = isinstance(transformer, nn.Module) and bool(_self_attentions(transformer))
    return sum(name in taken for name in PARAMETERS) / len(PARAMETERS) / 2 + layers / 2


def _layer_refusal(transformer: nn.Module) -> str:
    layers = _self_attentions(transformer)
    if not layers:
        return "the transformer has no blocks[i].attn1.attn"
    policy = getattr(layers[0], "rope_cache_policy", None)
    if policy not in POLICIES:
        return f"blocks[0].attn1.rope_cache_policy is {policy!r}, not one of {', '.join(POLICIES)}"
    if home_of(transformer, "get_forward_context") is None:
        return "the transformer's module has no get_forward_context"
    return ""


def _self_attentions(transformer: Any) -> list[Any]:
    return [layer for layer in layers_of(transformer, "blocks", "attn1") if hasattr(layer, "attn")]


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for FastVideo."""
    return [FastVideo]
