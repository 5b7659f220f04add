"""AnyFlow FAR in diffusers (``AnyFlowFARPipeline``).

Chunks of ``chunk_partition`` frames follow one another. Finished chunks are read from a KV cache: the latest ones in
full, older ones compressed (a patch of 4x4 latent pixels instead of 2x2). K is stored before RoPE and rotated by its
place, so rows cannot be taken out of the cache; keys are ``[compressed | full | the chunk | padding]``.

After each chunk a call at time 0 encodes *all* frames so far and rebuilds the cache from nothing. Dead tokens are
hidden there too, in its block mask, else their content would return through their neighbours' deeper layers.

The model predicts a mean velocity from t to r, so that x - sigma u is an estimate of x0, no more; good enough to see
which tokens drift. Guidance puts both branches in one batch; the conditional one is judged.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks import (
    Adapter,
    Call,
    KeyLayout,
    Match,
    NoMatch,
    Patches,
    Phase,
    Role,
    Seen,
    Segment,
    default_phase,
    hookimpl,
    layers_of,
)

from ._diffusers import lacking, recognised, share_of, tap_dispatch

PARAMETERS = ("chunk_partition", "r_timestep", "kv_cache", "kv_cache_flag")
BLOCK = 128
"""Queries are padded to a multiple of this, and keys by as many; padding is seen by all (upstream's choice)."""


class AnyFlowFAR(Adapter):
    """Chunks over a cache of full and compressed frames that is rebuilt after every chunk."""

    name = "anyflow-far"
    models = ("AnyFlow FAR (diffusers)",)
    context_kind = "KV cache of full and compressed frames, K before RoPE, rebuilt after every chunk"
    constructors = ("diffusers.pipelines.anyflow.pipeline_anyflow_far:AnyFlowFARPipeline",)

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the pipeline; the transformer alone cannot tell guidance branches from samples."""
        transformer: Any = getattr(model, "transformer", None)
        if not isinstance(transformer, nn.Module):
            return NoMatch("not a pipeline with a .transformer module", near=share_of(model, PARAMETERS))
        lacks = lacking(transformer, PARAMETERS)
        if lacks:
            return NoMatch(lacks, share_of(transformer, PARAMETERS))
        if not callable(getattr(model, "encode_kv_cache", None)):
            return NoMatch("the pipeline has no encode_kv_cache", near=1.0)
        config: Any = transformer.config
        if any(coarse % fine for coarse, fine in zip(config.compressed_patch_size, config.patch_size, strict=True)):
            return NoMatch("a compressed token does not cover whole tokens", near=1.0)
        if config.compressed_patch_size[0] != 1:
            return NoMatch("a compressed token spans several frames", near=1.0)
        return recognised(transformer, layers_of(transformer, "blocks", "attn1"), config.patch_size)

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the dispatcher inside self attention; cross attention calls it as well."""
        self.pipeline = model
        self._cache: weakref.ref[Tensor] | None = None
        self._opens = False
        tap_dispatch(patches, layers_of(model.transformer, "blocks", "attn1"))

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """The pipeline makes a cache for every video, and writes it in place."""
        cache = arguments["kv_cache"]
        return () if cache is None else (cache[0]["full_cache"],)

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one call; without a KV cache it is training. A cache call brings all frames, the chunk's are last."""
        cache, partition = arguments["kv_cache"], list(arguments["chunk_partition"])
        if cache is None:
            return None
        rows: Tensor = cache[0]["full_cache"]
        self._opens = self._cache is None or self._cache() is not rows
        self._cache = weakref.ref(rows)
        return Call(
            self._judged(arguments["hidden_states"], partition[-1]),
            start=sum(partition[:-1]),
            timestep=arguments["timestep"],
            commits=bool(arguments["kv_cache_flag"]["is_cache_step"]),
            arguments=arguments,
        )

    def phase(self, call: Call, seen: Seen) -> Phase:
        """A new cache is a new video; otherwise the call says whether it writes the cache."""
        return Phase.FIRST if self._opens else default_phase(call, seen)

    def restarts(self, call: Call, seen: Seen) -> bool:
        """The pipeline makes a cache for every video."""
        return self._opens

    def prediction(self, call: Call, output: Any) -> Tensor:
        """Estimate of x0; a cache call has no output but was given the finished chunk."""
        if call.commits:
            return call.latents
        mean_velocity = self._judged(output[0], call.frames).float()
        sigma = self._judged(call.arguments["timestep"], call.frames).float() / 1000
        return call.latents.float() - sigma[..., None, None, None] * mean_velocity

    def context(self, call: Call) -> KeyLayout:
        """Keys of self attention. A call that writes the cache keeps one chunk less in full than one that reads it."""
        config = self.pipeline.transformer.config
        partition = list(call.arguments["chunk_partition"])
        kept = config.full_chunk_limit - (1 if call.commits else 0)
        compressed = sum(partition[: max(len(partition) - kept, 0)])
        segments = [self._segment(call, range(compressed), config.compressed_patch_size)]
        segments += [
            self._segment(call, frames, config.patch_size)
            for frames in (range(compressed, call.start), range(max(compressed, call.start), call.end))
        ]
        queries = segments[2].length if not call.commits else sum(segment.length for segment in segments)
        padding = math.ceil(queries / BLOCK) * BLOCK - queries
        return KeyLayout((*segments, Segment(Role.OTHER, (0,), padding, 1)))

    def _segment(self, call: Call, frames: range, patch_size: Sequence[int]) -> Segment:
        """Frames at one patch size: the chunk's own, or context."""
        fine = self.pipeline.transformer.config.patch_size
        height, width = (int(call.latents.shape[-2 + axis]) // int(patch_size[1 + axis]) for axis in (0, 1))
        role = Role.CURRENT if frames and frames[0] >= call.start else Role.CONTEXT
        scale = (1, int(patch_size[1]) // int(fine[1]), int(patch_size[2]) // int(fine[2]))
        return Segment(role, frames, height, width, scale)

    def _judged(self, batch: Tensor, frames: int) -> Tensor:
        """The last frames of a ``[B, F, ...]`` batch, of the conditional half under guidance."""
        start = batch.shape[0] // 2 if self.pipeline.do_classifier_free_guidance else 0
        return batch[start:, -frames:]


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for AnyFlow FAR."""
    return [AnyFlowFAR]
