"""Self-Forcing (guandeh17/Self-Forcing) and samplers that call its generator wrapper in the same way.

The sampler calls ``generator(noisy_image_or_video, conditional_dict, timestep, kv_cache, crossattn_cache,
current_start)`` several times per chunk, then once more with the finished chunk at timestep 0 to write clean context.
The cache is a list of dicts, one per layer, with K stored after RoPE; rows of older frames roll left when the window is
full, behind a fixed prefix of sink frames. ``current_start`` counts tokens.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from tokentrim_hooks import (
    Adapter,
    Call,
    Match,
    NoMatch,
    Phase,
    Seen,
    home_of,
    hookimpl,
    parameters_of,
    shares_storage,
)

from ._strangers import stranger
from ._switches import SWITCHES
from ._wan import CausalWan, self_attentions

STRUCTURES = {
    "incremental_update": "Reward-Forcing",
    "block_relativistic_rope": "Infinity-RoPE",
    "fuse_projections": "Krea's realtime-video",
    "block_id": "Rolling Sink",
}
"""Attributes of self attention, or names in its module, of forks that bend the rules of the cache."""


class SelfForcing(CausalWan):
    """Chunk-wise KV-cache rollout of ``CausalInferencePipeline`` and of scripts that write that loop themselves."""

    name = "self-forcing"
    models: ClassVar[tuple[str, ...]] = ("Self-Forcing", "Causal-Forcing", "tokentrim reference model")
    context_kind = "rolling KV cache, K after RoPE"

    takes: ClassVar[frozenset[str]] = frozenset({"judge", "hide", "commit", "correct", "settle", "guide", "weigh"})
    switches = SWITCHES
    constructors: ClassVar[tuple[str, ...]] = (
        *CausalWan.constructors,
        "tokentrim_hooks.reference.pipeline:ReferencePipeline",
    )
    structure: ClassVar[str] = ""
    """The one of STRUCTURES that this adapter knows; its model must have it."""
    opens = True
    """Whether the latest call is of a video's first generated block."""

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """As the family's; models that were looked at and cannot be pruned hear from Self-Forcing's own adapter why."""
        words = stranger(model) if cls is SelfForcing else ""
        return NoMatch(words, 1.0) if words else super().probe(model)

    @classmethod
    def _probe_layers(cls, generator: nn.Module) -> Match | NoMatch:
        for layer in self_attentions(generator)[:1]:
            for mark, relative in STRUCTURES.items():
                has = hasattr(layer, mark) or hasattr(home_of(layer), mark)
                # Others may number their blocks, too; Rolling Sink's attention asks besides whether it commits.
                has = has and (mark != "block_id" or "timestep" in parameters_of(layer))
                if has and mark != cls.structure:
                    return NoMatch(f"self attention has {mark}: this is {relative}")
                if mark == cls.structure and not has:
                    return NoMatch(f"self attention has no {mark}")
        return super()._probe_layers(generator)

    def phase(self, call: Call, seen: Seen) -> Phase:
        """Trust the number of steps only until a commit was recognised by its tensor: it may differ by chunk."""
        phase = super().phase(call, seen)
        # The first block that is generated: at the beginning, or behind frames handed in, which nobody commits.
        self.opens = call.start == 0 or not seen.committed
        return Phase.REFINE if phase is Phase.COMMIT and not self._commits(call, seen) else phase

    def steps(self, call: Call) -> int | None:
        """Causal-Forcing's first block may have a schedule of its own; then both are read from the pipeline."""
        first = getattr(self.pipeline, "denoising_step_list_first_chunk", None)
        if first is None:
            return None
        return len(first if self.opens else self.pipeline.denoising_step_list)

    def _commits(self, call: Call, seen: Seen) -> bool:
        return bool(call.commits) or not self.hands_back or shares_storage(call.latents, seen.returned)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for Self-Forcing."""
    return [SelfForcing]
