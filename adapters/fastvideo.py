"""FastVideo's causal Wan (``CausalWanTransformer3DModel``), as its causal stages sample from it.

The stage keeps the KV cache in a local variable: it is seen only as an argument of the transformer's calls, several per
chunk and then one with the finished chunk. Wan2.2 has two transformers (high and low noise), each with its own cache.
Rows roll left behind the sink frames. With ``rope_cache_policy`` "absolute" the cache holds roped K; with
"relativistic" raw K, roped anew by its place in the window at every call. Either way K is roped before it reaches the
attention module ``attn1.attn``, so dead rows may be left out there.

The transformer predicts flow: x0 = x_t - sigma * flow, with sigma looked up in the scheduler as the stage does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

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
    UnsupportedPolicyError,
    bind,
    home_of,
    hookimpl,
    lacks,
    layers_of,
    parameters_of,
    x0_of_flow,
)

from ._flow_stage import flow_of, sigma_of, stage_of
from ._wan import history_rows, rows_per_frame, values_of

PARAMETERS = ("hidden_states", "timestep", "kv_cache", "crossattn_cache", "current_start", "start_frame")
FOREIGN = ("kv_cache_mouse", "kv_cache_keyboard")
"""Parameters of Matrix-Game 2, whose action caches follow other rules."""
POLICIES = ("absolute", "relativistic")
CONVERT = "pred_noise_to_pred_video"


class FastVideo(Adapter):
    """Causal Wan in FastVideo: give the composed pipeline, its causal denoising stage, or the bare transformer.

    Only a pipeline or stage shows the scheduler; without it sigma is timestep / 1000.
    """

    name = "fastvideo"
    models: ClassVar[tuple[str, ...]] = ("FastVideo causal Wan2.1",)
    context_kind = "rolling KV cache, K after RoPE (absolute) or before it (relativistic)"
    takes: ClassVar[frozenset[str]] = frozenset({"judge", "hide", "commit", "correct", "settle", "weigh"})
    constructors = ("fastvideo.pipelines.stages.causal_denoising:CausalDMDDenosingStage",)
    transformers: ClassVar[int] = 1
    """How many transformers its stage has."""

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
        if len(transformers) != cls.transformers:
            return NoMatch(f"the stage has {'a second' if second is not None else 'no second'} transformer", 0.5)
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
        return x0_of_flow(output.transpose(1, 2), call.latents, sigma_of(self.stage, call.timestep))

    def with_prediction(self, call: Call, output: Any, x0: Tensor) -> Any:
        """The flow of which the few-step stage makes ``x0``; a stage that follows the flow itself is refused."""
        assert call.timestep is not None
        if not _makes_x0(self.stage):
            raise UnsupportedPolicyError(
                f"{type(self.stage).__name__}.forward does not call {CONVERT}: it may follow the flow, so a changed x0 "
                "would be lost.\nLeave such policies out, or patch a CausalDMDDenosingStage."
            )
        return flow_of(x0, call.latents, sigma_of(self.stage, call.timestep)).transpose(1, 2)

    def with_latents(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Other latents, as ``[B, C, F, H, W]`` again: the stage gives them by position."""
        hidden_states = latents.transpose(1, 2)
        return ((hidden_states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_states})

    def carry(self, call: Call, before: Tensor, after: Tensor) -> Tensor:
        """The stage re-noises x0: x_t = (1 - sigma) x0 + sigma noise, so keep the noise and move x0."""
        assert call.timestep is not None
        kept = 1 - sigma_of(self.stage, call.timestep).view(-1, 1, 1, 1, 1)
        return (call.latents.double() + kept * (after.double() - before.double())).to(call.latents.dtype)


class FastVideoPair(FastVideo):
    """Wan2.2: a transformer for high noise and one for low, each with a cache of its own, both of which are pruned.

    The second is followed as a branch of the first. It commits before the first does, so which of its calls is a
    commit, or its chunk's last, is not told apart: no policy but those that judge, and no whole-chunk probe.
    """

    name = "fastvideo-pair"
    models = ("FastVideo causal Wan2.2 (two transformers)",)
    takes = frozenset({"judge"})
    transformers = 2

    carry = Adapter.carry  # refused: a step may be made by the other transformer, on its own cache


def _makes_x0(stage: Any) -> bool:
    """Whether a stage's loop makes x0 of flow, as its code says: then it goes on with that and with nothing else."""
    code = getattr(inspect.unwrap(type(stage).forward), "__code__", None)
    return code is not None and CONVERT in code.co_names


def _refusal(transformer: Any) -> str:
    """Why this is not a causal Wan of FastVideo; empty if it is."""
    cached = getattr(transformer, "_forward_inference", None)
    if not isinstance(transformer, nn.Module) or not callable(cached):
        return "no module with a _forward_inference, nor a stage or pipeline that has one as .transformer"
    foreign = [name for name in FOREIGN if name in parameters_of(cached)]
    if foreign:
        return f"the transformer's _forward_inference takes {', '.join(foreign)}: Matrix-Game 2, with caches of actions"
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
    return [FastVideo, FastVideoPair]
