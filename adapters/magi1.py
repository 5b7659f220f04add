"""MAGI-1 (SandAI-org/MAGI-1): base models with three passes of guidance and distilled ones with one.

Several chunks are denoised at a time, each further than the next (``window_size``; 1 = one after the other). Sampling
calls ``forward_dispatcher`` with a few consecutive chunks, ``x`` ``[2, C, T, H, W]`` (both rows alike), at time ``t``
from 0 = noise to 1 = clean, and gets their velocity: x0 = x + (1 - t) v. Keys are a memory of finished chunks followed
by the chunks of the call, so that a key's row is its place in the video; each chunk attends to one contiguous range
that ends with itself. A finished chunk is written into the memory by the call in which the next chunk starts.

Patch the ``MagiPipeline`` before ``run_text_to_video`` and its siblings (it builds a model for every run: the patch
sits on the model's class and minds models of this pipeline only), or the model that ``get_dit`` returned, for loops
over ``generate_per_chunk``. An image or video given as prefix is context like any other.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks import (
    Adapter,
    Call,
    CallTap,
    KeyLayout,
    Match,
    Method,
    NoMatch,
    Patches,
    Phase,
    Role,
    Seen,
    Segment,
    UnsupportedContextError,
    home_of,
    hookimpl,
    layers_of,
)

from ._replaced import replaced_forward

DENOISER = "forward_dispatcher"


class Magi1(Adapter):
    """Chunk-wise denoising with several chunks in flight; what is pruned for a chunk stays visible to earlier ones."""

    name = "magi-1"
    models = ("MAGI-1 24B and 4.5B (base, distilled)",)
    context_kind = "KV memory of finished chunks, and chunks in flight"
    constructors = ("inference.pipeline.pipeline:MagiPipeline", "inference.model.dit.dit_model:VideoDiTModel")

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the model, wrapped or not, or a pipeline that will build one."""
        dit = _dit_of(model)
        owner = dit if dit is not None else _dit_class_of(model)
        if owner is None:
            return NoMatch("neither a model with forward_dispatcher and videodit_blocks, nor a pipeline with get_dit")
        config: Any = dit if dit is not None else model.config  # type: ignore[attr-defined]
        reason = _refusal(config.engine_config)
        if reason:
            return NoMatch(reason, near=1.0)
        size = int(config.model_config.patch_size)
        return Match(Method(owner, DENOISER), (size, size))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap ``core_attention``: of the layers of a given model, or of the class that a pipeline's models will use."""
        dit = _dit_of(model)
        self.runtime: Any = (model.config if dit is None else dit).runtime_config
        self.memory: weakref.ref[Any] | None = None
        self.new_memory = False
        if dit is None:
            patches.tap_packed(_attention_class(_dit_class_of(model)), "core_attention", attend_ranges)
            return
        for layer in _attentions(dit):
            patches.tap_packed(layer, "core_attention", attend_ranges)

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Every video has a memory of its own."""
        return (arguments["inference_params"],)

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one call; other models of the class are none of ours. A prefix video is given, clean, in one call."""
        memory, options = arguments["inference_params"], arguments["kwargs"]
        if arguments["self"].runtime_config is not self.runtime or memory is None:
            return None
        if other := replaced_forward(arguments["self"], "inference_params"):
            raise UnsupportedContextError(
                f"the model's forward was replaced by {other}, which keeps K and V and leaves out calls by rules of "
                "its own.\nNothing of it can be pruned: sample without it, as FlowCache's entry.py does."
            )
        self.new_memory = self.memory is None or self.memory() is not memory
        self.memory = weakref.ref(memory)
        width = int(options["chunk_width"])
        return Call(
            _chunk(arguments["x"], width, 1),
            start=(int(options["range_num"]) - 1) * width,
            commits=bool(options.get("extract_prefix_video_feature", False)),
            arguments=arguments,
        )

    def phase(self, call: Call, seen: Seen) -> Phase:
        """A chunk begins when it joins the call as its newest; a memory of its own begins a video."""
        return Phase.FIRST if self.new_memory or call.start != seen.start else Phase.REFINE

    def restarts(self, call: Call, seen: Seen) -> bool:
        """Every video has a memory of its own."""
        return self.new_memory

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 of the newest chunk."""
        return _clean_estimate(call, output, 1)

    def in_flight(self, call: Call, output: Any) -> Tensor | None:
        """x0 of the chunk before, while it is in flight."""
        return _clean_estimate(call, output, 2) if _in_flight(call) > 1 else None

    def accepted(self, call: Call) -> Tensor | None:
        """With ``window_size`` 1 the chunk before is finished, and part of the call that writes it into the memory."""
        if _in_flight(call) == 1 and call.arguments["kwargs"]["fwd_extra_1st_chunk"]:
            return _chunk(call.arguments["x"], call.frames, 2)
        return None

    def context(self, call: Call) -> KeyLayout:
        """The video's chunks in order. Those that no query of the call sees any more are left alone."""
        arguments = call.arguments
        options, dit = arguments["kwargs"], arguments["self"]
        patch_size = int(dit.model_config.patch_size)
        height, width = (size // patch_size for size in call.latents.shape[-2:])
        newest = int(options["range_num"]) - 1
        flying = newest + 1 - _in_flight(call)
        seen = int(arguments["kv_range"][:, 0].min()) // (call.frames * height * width)

        def chunks(role: Role, first: int, stop: int) -> Segment:
            return Segment(role, range(first * call.frames, stop * call.frames), height, width)

        segments = [
            chunks(Role.OTHER, 0, seen),
            chunks(Role.CONTEXT, seen, max(flying, seen)),
            *(chunks(Role.FLIGHT, chunk, chunk + 1) for chunk in range(max(flying, seen), newest)),
            chunks(Role.CURRENT, newest, newest + 1),
        ]
        guided = dit.runtime_config.cfg_number == 3
        if options.get("distill_nearly_clean_chunk", False) and not guided:
            segments.append(chunks(Role.OTHER, 0, 1))  # the oldest chunk once more, alone, in place of a pass
        return KeyLayout(tuple(segments), attentions=len(_attentions(dit)) * (2 if guided else 1))


def attend_ranges(
    tap: CallTap, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, bs: int, meta_args: Any
) -> Tensor:
    """``core_attention`` range by range, each on its live keys; rows are ``[length, heads, head_dim]``.

    The pass of guidance that sees no context (its chunks are a batch, each alone) goes through untouched.
    """
    if meta_args.range_num == 1:
        return attention(query, key, value, bs, meta_args)
    if bs != 1:
        raise UnsupportedContextError(f"cannot prune a packed batch of {bs} videos; make one at a time")
    params = meta_args.core_attn_params
    frames = meta_args.clip_token_nums // (meta_args.H * meta_args.W)
    outputs, dropped = [], False
    for i, (own, seen) in enumerate(zip(params.np_q_range, params.np_k_range, strict=True)):
        first, stop = int(seen[0]), int(seen[1])
        live = tap.live_range((meta_args.slice_point + i) * frames, first, stop, key)
        ours = slice(first, stop)
        outputs.append((query[int(own[0]) : int(own[1])], key[ours], value[ours], live))
        dropped = dropped or live is not None
    if not dropped:
        return attention(query, key, value, bs, meta_args)
    return torch.cat([_attend_one(attention, *output, meta_args) for output in outputs])


def _attend_one(
    attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, live: Tensor | None, meta_args: Any
) -> Tensor:
    """The original on one range: its queries, and the keys that are left of it."""
    if live is not None:
        key, value = key.index_select(0, live), value.index_select(0, live)
    params = meta_args.core_attn_params
    own, seen = (torch.tensor([[0, x.shape[0]]], dtype=torch.int32) for x in (query, key))
    alone = dataclasses.replace(
        params,
        q_range=own.to(params.q_range),
        k_range=seen.to(params.k_range),
        np_q_range=own.numpy(),
        np_k_range=seen.numpy(),
        max_seqlen_q=query.shape[0],
        max_seqlen_k=key.shape[0],
    )
    # FlowCache counts the chunks of the call from here, where it is one.
    first = {"start_chunk_id": meta_args.slice_point} if hasattr(meta_args, "start_chunk_id") else {}
    meta = dataclasses.replace(meta_args, denoising_range_num=1, core_attn_params=alone, **first)
    return attention(query, key, value, 1, meta)


# ------------------------------------------------------------------------------------------ chunks of a call


def _chunk(x: Tensor, frames: int, place: int) -> Tensor:
    """The chunk at ``place`` from the end (1 = newest) of ``[2, C, T, H, W]``, as ``[1, F, C, H, W]``."""
    stop = x.shape[2] - (place - 1) * frames
    return x[:1, :, stop - frames : stop].transpose(1, 2)


def _clean_estimate(call: Call, velocity: Tensor, place: int) -> Tensor:
    """x0 = x + (1 - t) v of a chunk in flight."""
    time: Tensor = call.arguments["timestep"][0, -place]
    return _chunk(call.arguments["x"], call.frames, place) + (1 - time) * _chunk(velocity, call.frames, place)


def _in_flight(call: Call) -> int:
    """Chunks of the call that are still noisy: all but the one that is written into the memory."""
    options = call.arguments["kwargs"]
    return int(options["denoising_range_num"]) - bool(options["fwd_extra_1st_chunk"])


# ------------------------------------------------------------------------------------------ finding the model


def _dit_of(model: Any) -> Any:
    """The model itself, also inside wrappers (``.module``) or held by a SampleTransport (``.model``)."""
    for _ in range(8):
        if isinstance(model, nn.Module) and callable(getattr(model, DENOISER, None)) and _attentions(model):
            return model
        holder = "model" if callable(getattr(model, "forward_velocity", None)) else "module"
        model = getattr(model, holder, None)
    return None


def _attentions(dit: Any) -> list[Any]:
    layers = layers_of(dit, "videodit_blocks.layers", "self_attention")
    return [layer for layer in layers if callable(getattr(layer, "core_attention", None))]


def _dit_class_of(pipeline: Any) -> Any:
    """The class of the models that a pipeline builds with ``get_dit``; None if ``pipeline`` is none."""
    build = getattr(home_of(pipeline), "get_dit", None)
    if not callable(getattr(pipeline, "run_text_to_video", None)) or not hasattr(pipeline, "config") or build is None:
        return None
    dit = getattr(home_of(build), "VideoDiTModel", None)
    return dit if callable(getattr(dit, DENOISER, None)) and _attention_class(dit) is not None else None


def _attention_class(dit: Any) -> Any:
    """The class of the attention layers, found where the blocks of the model are defined."""
    blocks = getattr(home_of(dit), "TransformerBlock", None)
    attention = getattr(home_of(blocks), "FullyParallelAttention", None)
    return attention if callable(getattr(attention, "core_attention", None)) else None


def _refusal(engine: Any) -> str:
    """Why a way of running on several devices is not supported; empty if it is."""
    if engine.pp_size > 1:
        return f"pp_size is {engine.pp_size}: a pipeline stage holds no velocity to judge; run with pp_size 1"
    if engine.cp_strategy == "cp_shuffle_overlap":
        return "cp_strategy 'cp_shuffle_overlap' attends to shuffled shards; run with 'cp_ulysses' and cp_size 1"
    if engine.cp_size > 1:
        return f"cp_size is {engine.cp_size}: context parallelism has not been proved here; run with cp_size 1"
    return ""


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for MAGI-1."""
    return [Magi1]
