"""What the causal relatives of Wan 2.1 have in common: one generator wrapper, one kind of KV cache, one attention.

The sampler calls ``generator(noisy_image_or_video, conditional_dict, timestep, kv_cache, crossattn_cache,
current_start)``; ``generator.model.blocks[i].self_attn`` calls a function ``attention`` of its own module, which cross
attention does not use. The cache is a list of dicts, one per layer: ``k`` and ``v`` ``[B, rows, heads, head_dim]``,
frame by frame, and the tensors ``global_end_index`` (rows of the video so far) and ``local_end_index`` (rows in the
cache).

Forks that nobody has looked at are recognised where nothing about them is new. A parameter of the generator, or an
entry of the cache, that the model has not which an adapter was written for may mean that other rules hold: such forks
are refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    UnsupportedContextError,
    UnsupportedPolicyError,
    default_phase,
    defaults_of,
    home_of,
    lacks,
    layers_of,
    nearest_sigma,
    parameters_of,
    shares_storage,
)

from ._replaced import replaced_forward
from ._switches import is_off, same

PARAMETERS = ("noisy_image_or_video", "conditional_dict", "timestep", "kv_cache", "crossattn_cache", "current_start")
"""Parameters that the forward of every generator wrapper of the family takes."""

OPTIONS = ("classify_mode", "concat_time_embeddings", "clean_x", "aug_t", "cache_start")
"""What most of them take besides; none of it changes the rules of the cache."""

RELATIVES = {
    "updating_cache": "Rolling Forcing",
    "sink_recache_after_switch": "LongLive",
    "kv_bank": "MemFlow",
    "current_end": "CausVid",
    "rope_temporal_offset": "LongLive 2.0",
}
"""Parameters of the wrapper that betray a relative whose cache follows other rules."""


class CausalWan(Adapter):
    """The rules of Self-Forcing's cache, which its relatives bend: rows before the chunk are history, after a sink."""

    takes: ClassVar[frozenset[str]] = frozenset({"judge"})
    own: ClassVar[tuple[str, ...]] = ()
    """Parameters that tell this relative from others; its generator's forward must take them all."""
    options: ClassVar[tuple[str, ...]] = OPTIONS
    """Further parameters that it may take."""
    switches: ClassVar[tuple[str, ...] | None] = None
    """Optional parameters that it may take as long as every call leaves them at their defaults. None: there are none;
    else any other that is off by default (None, False, or empty) is one, too, unless it is named for the context.
    """
    entries: ClassVar[tuple[str, ...]] = ("k", "v", "global_end_index", "local_end_index")
    """Entries of a layer's cache."""
    layer_attributes: ClassVar[tuple[str, ...]] = ("sink_size", "local_attn_size")
    """Attributes that every self-attention module must have."""
    pipeline: Any
    generator: Any
    _defaults: Mapping[str, Any] = {}
    """Of ``switches``, those that this generator takes."""
    _forward: Any = None
    """Of the first layer, as it was last seen."""
    hands_back = False
    """Whether this sampler was seen to commit the very x0 that it was given: only then does it go on with nothing else.
    """
    constructors: ClassVar[tuple[str, ...]] = (
        "pipeline.causal_inference:CausalInferencePipeline",
        "pipeline.causal_diffusion_inference:CausalDiffusionInferencePipeline",
    )

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the generator wrapper, given itself or as a pipeline's ``generator``."""
        generator = getattr(model, "generator", model)
        if not isinstance(generator, nn.Module):
            return NoMatch("neither a module nor a pipeline with a .generator module")
        taken = parameters_of(generator)
        layers, wanted = cls._probe_layers(generator), (*PARAMETERS, *cls.own)
        near = sum(name in taken for name in wanted) / len(wanted) / 2 + isinstance(layers, Match) / 2
        for name, relative in RELATIVES.items():
            if name in taken and name not in cls.own:
                return NoMatch(f"the generator's forward takes {name!r}: this is {relative}", near / 2)
        reason = lacks(generator, wanted, "the generator's forward")
        spared = cls.spared(generator)
        unknown = [name for name in taken if name not in (*PARAMETERS, *cls.own, *cls.options, *spared)]
        if unknown and not reason:
            reason = f"the generator's forward takes {', '.join(unknown)}, which {cls.models[0]}'s does not"
        if isinstance(layers, NoMatch):
            return NoMatch(reason or layers.reason, near if reason else max(near, layers.near))
        return NoMatch(reason, near) if reason else layers

    @classmethod
    def _probe_layers(cls, generator: nn.Module) -> Match | NoMatch:
        patch_size = getattr(getattr(generator, "model", None), "patch_size", None)
        layers = self_attentions(generator)
        if not layers or patch_size is None:
            return NoMatch("generator.model has no blocks[i].self_attn or no patch_size")
        if not all(hasattr(layer, name) for layer in layers for name in cls.layer_attributes):
            return NoMatch(f"self_attn has no {' and '.join(cls.layer_attributes)}")
        if other := replaced_forward(layers[0]):
            return NoMatch(f"self attention's forward was replaced by {other}, whose cache may follow other rules", 1.0)
        if home_of(layers[0], "attention") is None:
            return NoMatch("the module of self_attn has no global function attention(q, k, v)")
        return Match(generator, (int(patch_size[1]), int(patch_size[2])))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the module-global ``attention``, which only self attention calls."""
        self.pipeline, self.generator = model, getattr(model, "generator", model)
        self.layers = self_attentions(self.generator)
        defaults = defaults_of(self.generator)
        self._defaults = {name: defaults[name] for name in self.spared(self.generator)}
        for home in dict.fromkeys(map(home_of, self.layers)):
            patches.tap(home, "attention", refuse=("q_lens", "k_lens"))

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """A video has a KV cache of its own."""
        return (values_of(arguments["kv_cache"]),)

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one generator call; calls without a KV cache are training or scoring, not a rollout."""
        if arguments["kv_cache"] is None:
            return None
        self.require_own_forward()
        self.require_entries(arguments["kv_cache"])
        self.require_defaults(arguments)
        latents: Tensor = arguments["noisy_image_or_video"]
        return Call(
            latents,
            start=start_of(arguments) // self.rows_per_frame(latents),
            stream=arguments["kv_cache"][0]["v"],
            timestep=arguments["timestep"],
            arguments=arguments,
        )

    def require_own_forward(self) -> None:
        """Raise UnsupportedContextError where somebody has replaced what the layers do since the patch."""
        forward = vars(self.layers[0]).get("forward"), type(self.layers[0]).forward
        if forward != self._forward and (other := replaced_forward(self.layers[0])):
            raise UnsupportedContextError(
                f"self attention's forward was replaced by {other} after the patch, and its cache may follow other "
                "rules.\nNothing of it can be pruned: patch a model without it, or write an adapter for it."
            )
        self._forward = forward

    def require_entries(self, cache: Any) -> None:
        """Raise UnsupportedContextError for a cache with entries more or less than it should have."""
        layer = cache[0] if isinstance(cache, list | tuple) and cache else None
        entries = layer.keys() if isinstance(layer, dict | Mapping) else set()
        if entries != set(self.entries):
            odd = ", ".join(sorted(map(str, entries ^ set(self.entries))))
            raise UnsupportedContextError(
                f"the KV cache is no list of dicts of {', '.join(self.entries)} (differs in: {odd}), so its rows may "
                f"follow other rules than {self.models[0]}'s; nothing is pruned. Write an adapter for this fork"
            )
        if values_of(cache) is None:
            raise UnsupportedContextError(
                f"the KV cache holds {type(cache[0]['v']).__name__} where a tensor is expected, so nothing is pruned.\n"
                "Use a cache of plain tensors, or write an adapter for this fork."
            )

    @classmethod
    def spared(cls, generator: nn.Module) -> list[str]:
        """Parameters of its forward that are harmless while they are left alone: ``switches``."""
        if cls.switches is None:
            return []
        known = {*PARAMETERS, *cls.own, *cls.options}
        return [
            name
            for name, default in defaults_of(generator).items()
            if name not in known and (name in cls.switches or is_off(name, default))
        ]

    def require_defaults(self, arguments: Mapping[str, Any]) -> None:
        """Raise UnsupportedContextError for a call that gives one of ``switches``: then nobody knows its rules."""
        for name, default in self._defaults.items():
            if not same(arguments[name], default):
                raise UnsupportedContextError(
                    f"the generator was called with {name}=..., which {self.models[0]} does not take.\n"
                    "Leave it at its default, with which this fork can be pruned, or write an adapter for the fork."
                )

    def context(self, call: Call) -> CacheRows:
        """Rows before the current chunk: which are the last ones once the chunk has been written."""
        self.require_entries(call.arguments["kv_cache"])  # the call may have added some, as MemRoPE's does
        per_frame = self.rows_per_frame(call.latents)
        sink = int(self.layers[0].sink_size) * per_frame
        return history_rows(call.arguments, call.frames * per_frame, per_frame, sink)

    def phase(self, call: Call, seen: Seen) -> Phase:
        """As samplers do that denoise, then commit the chunk they returned."""
        return self.noted(default_phase(call, seen), call, seen)

    def noted(self, phase: Phase, call: Call, seen: Seen) -> Phase:
        """``phase``; notes a commit of the very tensor that the sampler was given."""
        if phase is Phase.COMMIT and shares_storage(call.latents, seen.returned):
            self.hands_back = True
        return phase

    def with_prediction(self, call: Call, output: Any, x0: Tensor) -> Any:
        """The few-step sampler goes on with x0; one that goes on with the flow beside it is refused."""
        if not self.hands_back:
            raise UnsupportedPolicyError(
                "this sampler does not commit the model's x0 (it follows the flow, or joins chunks): a corrected one "
                "is lost.\nLeave such policies out, or use the few-step sampler."
            )
        return super().with_prediction(call, output, x0)

    def carry(self, call: Call, before: Tensor, after: Tensor) -> Tensor:
        """The few-step sampler re-noises x0: x_t = (1 - sigma) x0 + sigma noise, so keep the noise and move x0."""
        assert call.timestep is not None
        sigma = nearest_sigma(self.generator.scheduler, call.timestep).double()[..., None, None, None]
        moved = call.latents.double() + (1 - sigma) * (after.double() - before.double())
        return moved.to(call.latents.dtype)

    def noise_level(self, call: Call) -> Tensor:
        """Sigma of the scheduler's nearest timestep."""
        assert call.timestep is not None
        return nearest_sigma(self.generator.scheduler, call.timestep)

    def scratch(self, call: Call) -> Mapping[str, Any]:
        """The caches again: of K and V no more rows than the call reads and writes, with counters of their own."""
        rows = self.context(call).stop + call.frames * self.rows_per_frame(call.latents)
        given, texts = call.arguments, call.arguments["crossattn_cache"]
        own = [name for name in self.own if name.startswith("kv_cache_") and given[name] is not None]
        scratch = {name: [_copied(layer, rows) for layer in given[name]] for name in ("kv_cache", *own)}
        return scratch if texts is None else {**scratch, "crossattn_cache": [dict(layer) for layer in texts]}

    def rows_per_frame(self, latents: Tensor) -> int:
        """Spatial tokens, and so cache rows, of a latent frame of ``latents`` ``[..., H, W]``."""
        return rows_per_frame(self.generator.model, latents)


def _copied(layer: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A layer's cache with tensors of its own, the first ``rows`` rows of K and V."""
    tensors = {name: value for name, value in layer.items() if isinstance(value, Tensor)}
    copies = {name: (value[:, :rows] if value.ndim == 4 else value).detach().clone() for name, value in tensors.items()}
    return {**layer, **copies}


def rows_per_frame(transformer: Any, latents: Tensor) -> int:
    """Tokens of a latent frame of ``latents`` ``[..., H, W]``; ``patch_size`` is (frames, height, width) of one."""
    _, height, width = transformer.patch_size
    return latents.shape[-2] * latents.shape[-1] // (int(height) * int(width))


def values_of(cache: Any) -> Any:
    """V of the first layer of a cache, which is one piece of memory whatever lists and dicts it comes in.

    None where there is no cache, or none that we know: ``parse`` says what follows.
    """
    # A plain list of dicts is one without asking the abstract classes, which takes ten times as long.
    layer = cache[0] if isinstance(cache, list | Sequence) and cache else None
    values = layer.get("v") if isinstance(layer, dict | Mapping) else None
    return values if isinstance(values, Tensor) else None


def history_rows(arguments: Mapping[str, Any], new: int, per_frame: int, anchors: int) -> CacheRows:
    """Rows of finished frames in the cache of a call that writes ``new`` rows; the first ``anchors`` are a sink.

    The cache may have been written by the call already or not: its counter of the video's rows tells.
    """
    cache: Sequence[Mapping[str, Any]] = arguments["kv_cache"]
    written = int(cache[0]["global_end_index"]) >= start_of(arguments) + new
    stop = max(int(cache[0]["local_end_index"]) - (new if written else 0), 0)
    keys = [layer["k"] for layer in cache]
    return CacheRows([layer["v"] for layer in cache], 0, stop, per_frame, min(anchors, stop), keys=keys)


def start_of(arguments: Mapping[str, Any]) -> int:
    """First token of the call, counted from the start of the video."""
    return int(arguments["current_start"] or 0)


def self_attentions(generator: object) -> list[Any]:
    """Self-attention modules of ``generator.model``, one per block."""
    return layers_of(generator, "model.blocks", "self_attn")
