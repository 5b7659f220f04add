"""StreamDiffusionV2's ``CausalStreamInferencePipeline``, one stream at a time (``inference_wo_batch``).

The generator is CausVid's, but its cache becomes a ring buffer when it is full: a queue of slots on every attention
module (``evict_idx``) says which rows the next chunk overwrites, a counter in the cache when to go on to the next
slot. Sinks lie in front. K is stored after RoPE, so the order of rows means nothing. There is no clean-context call:
K and V of the denoising steps stay. Every call moves queues and counters, so a replay must put them back first.

``current_start`` is a device tensor, and goes back to an earlier position on long streams without a new video; so
chunks are counted where the pipeline's methods are entered, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokentrim_hooks import (
    Adapter,
    CacheRows,
    Call,
    Match,
    NoMatch,
    Patches,
    UnsupportedContextError,
    home_of,
    hookimpl,
    lacks,
)

from ._wan import rows_per_frame, self_attentions

PARAMETERS = ("noisy_image_or_video", "conditional_dict", "timestep", "kv_cache", "current_start", "current_end")
METHODS = ("prepare", "inference_wo_batch", "inference_stream", "inference")
BATCHED = ("inference_stream", "inference")
"""Methods that denoise several chunks at once, one per sample, each at another step."""
FALLBACK, FLASH = "attention_with_kvcache_fallback", "flash_attn_with_kvcache"


class Before(NamedTuple):
    """A layer's queue of slots, step counter and end indices before the first call of a chunk."""

    slots: list[list[int]] | None
    step: int
    ends: tuple[Tensor, Tensor]


class StreamDiffusionV2(Adapter):
    """Give the ``CausalStreamInferencePipeline``, or an object that holds it as ``.pipeline``.

    Batched streams are refused (one call holds different chunks at different steps: there is no one chunk to judge),
    and so are adaptive sinks (each layer would overwrite other rows).
    """

    name = "streamdiffusion-v2"
    models = ("StreamDiffusionV2 (one stream, without batched denoising)",)
    context_kind = "ring-buffer KV cache, K after RoPE"
    takes = frozenset({"judge", "hide", "correct", "weigh"})
    """Nothing commits, so nothing can be settled or hidden from a commit. A corrected x0 is what the stream shows;
    later chunks read K and V of the call that predicted it, as it was."""
    constructors = ("models.wan.causal_stream_inference:CausalStreamInferencePipeline",)

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the pipeline by its methods, its generator by its arguments, attention by its queue of slots."""
        pipeline: Any = _pipeline(model)
        generator = getattr(pipeline, "generator", None)
        missing = [name for name in METHODS if not callable(getattr(pipeline, name, None))]
        if missing or not isinstance(generator, nn.Module):
            near = (1 - len(missing) / len(METHODS)) / 2
            return NoMatch(f"no pipeline with a .generator module and methods {', '.join(METHODS)}", near)
        reason = lacks(generator, PARAMETERS, "the generator's forward")
        if reason:
            return NoMatch(reason, near=0.5)
        layers = self_attentions(generator)
        if not layers or not all(hasattr(layer, "evict_idx") for layer in layers):
            return NoMatch("generator.model.blocks[i].self_attn has no evict_idx: the cache is no ring buffer", 0.9)
        if home_of(layers[0], FALLBACK) is None:
            return NoMatch(f"the module of self_attn has no function {FALLBACK}", near=1.0)
        _, height, width = generator.model.patch_size  # type: ignore[union-attr, misc]
        return Match(generator, (int(height), int(width)))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap both attention functions; count chunks where the pipeline is entered."""
        pipeline = _pipeline(model)
        self.generator: Any = pipeline.generator
        self.layers = self_attentions(self.generator)
        self.start, self.frames, self.made, self.before = 0, 0, 0, list[Before]()
        home = home_of(self.layers[0])
        names: dict[str, Any] = {"k": "k_cache", "v": "v_cache", "lengths": "cache_seqlens"}
        patches.tap(home, FALLBACK, **names)
        if home.flash_attn_interface is not None:
            patches.tap(home.flash_attn_interface, FLASH, refuse=("k", "v", "cache_batch_idx", "block_table"), **names)
        patches.wrap(pipeline, "prepare", self._new_video)
        patches.wrap(pipeline, "inference_wo_batch", self._next_chunk)
        for name in BATCHED:
            patches.wrap(pipeline, name, _refuse)
        patches.hook(self.generator, before=self._note, after=self._count)

    def _new_video(self, wrapped: Any, _pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.start, self.frames, self.made, self.before = 0, 0, 0, []
        return wrapped(*args, **kwargs)

    def _next_chunk(self, wrapped: Any, _pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.start, self.made, self.before = self.start + self.frames, 0, []
        return wrapped(*args, **kwargs)

    def _note(self, _generator: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """Before the first call of a chunk, note what a replay must put back."""
        if self.before or kwargs.get("kv_cache") is None:
            return
        self.frames = int(kwargs["noisy_image_or_video"].shape[1])
        for layer, cache in zip(self.layers, kwargs["kv_cache"], strict=True):
            slots = None if layer.evict_idx is None else [list(queue) for queue in layer.evict_idx]
            ends = (cache["global_end_index"].clone(), cache["local_end_index"].clone())
            self.before.append(Before(slots, cache["current_step"], ends))

    def _count(self, *_: Any) -> None:
        self.made += 1

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one generator call. There is no clean-context call, so none commits."""
        if arguments["kv_cache"] is None:
            return None
        latents: Tensor = arguments["noisy_image_or_video"]
        if latents.shape[0] > 1:
            raise UnsupportedContextError(BATCHED_REASON)
        if self.layers[0].adapt_sink_thr > -1 and self.layers[0].sink_size > 0:
            raise UnsupportedContextError(
                "adaptive sinks overwrite other rows in every layer; set adapt_sink_threshold to -1, as "
                "StreamDiffusionV2's fast configuration does"
            )
        return Call(latents, self.start, timestep=arguments["timestep"], commits=False, arguments=arguments)

    def context(self, call: Call) -> CacheRows:
        """All rows but the slot that the first call of this chunk has overwritten, or filled behind the others."""
        cache = call.arguments["kv_cache"]
        per_frame = rows_per_frame(self.generator.model, call.latents)
        size, new = int(cache[0]["k"].shape[1]), call.frames * per_frame
        filled = int(self.before[0].ends[1] if self.before else cache[0]["local_end_index"])
        full = filled >= size or int(call.arguments["current_start"][0]) + new > size
        slots = self.before[0].slots if self.before else self.layers[0].evict_idx
        current = (slots[0][0] - new, slots[0][0]) if full and slots else (0, 0)
        stop = size if full else filled
        anchors = min(int(self.layers[0].sink_size) * per_frame, stop)
        ahead = self._slot_ahead(full or filled + new >= size, new)
        frames = _ages(slots[0], new, per_frame, anchors, self.start) if full and slots else ()
        if ahead:
            frames = frames or tuple((row // per_frame, row) for row in range(anchors, stop, per_frame))
            frames = tuple((frame, row) for frame, row in frames if not ahead[0] <= row < ahead[1])
        return CacheRows([layer["v"] for layer in cache], 0, stop, per_frame, anchors, current, frames=frames)

    def _slot_ahead(self, full: bool, new: int) -> tuple[int, int] | None:
        """The slot that a chunk's later calls write, which is the next one: the counter of steps begins a call late."""
        slots = self.layers[0].evict_idx
        return (slots[0][0] - new, slots[0][0]) if self.made and full and slots and slots[0] else None

    def replay(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put queues, counters and end indices back as they were before the first attempt."""
        for layer, cache, before in zip(self.layers, kwargs["kv_cache"], self.before, strict=True):
            layer.evict_idx = None if before.slots is None else [list(queue) for queue in before.slots]
            cache["current_step"] = before.step
            cache["global_end_index"].copy_(before.ends[0])
            cache["local_end_index"].copy_(before.ends[1])
        return denoiser(*args, **kwargs)


BATCHED_REASON = (
    "batched streams put different chunks at different denoising steps into one call, so there is no one chunk to "
    "judge; use prepare(batch_denoise=False) and inference_wo_batch"
)


def _refuse(wrapped: Any, _pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise UnsupportedContextError(BATCHED_REASON)


def _ages(queue: Sequence[int], new: int, per_frame: int, anchors: int, start: int) -> tuple[tuple[int, int], ...]:
    """(latent frame, first row) behind the sinks in a full ring, oldest first, for the chunk at frame ``start``.

    The queue has the slots in the order in which they are overwritten, this chunk's first. A first chunk of more frames
    than later ones leaves rows between sinks and ring that never are: they keep the frames of the beginning.
    """
    turned = [row for end in queue for row in range(end - new, end, per_frame)]
    stuck = ((row // per_frame, row) for row in range(anchors, min(turned), per_frame))
    ring = turned[new // per_frame :]
    return (*stuck, *enumerate(ring, start - len(ring)))


def _pipeline(model: Any) -> Any:
    return model if hasattr(model, "generator") else getattr(model, "pipeline", model)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for StreamDiffusionV2."""
    return [StreamDiffusionV2]
