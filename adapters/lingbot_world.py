"""LingBot-World 2 causal-fast in FastVideo (``LingBotWorld2CausalFastTransformer3DModel``).

Cache and module-global ``attention`` are Self-Forcing's. Latents are a list ``x`` of ``[C, F, H, W]``, ``t`` is one
timestep a sample, the answer is flow; the stage makes x0 of it, re-noises that and goes on with nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Adapter, Call, Match, NoMatch, Patches, home_of, hookimpl, lacks, layers_of

from ._flow_stage import Commits, ListedLatents, stage_of
from ._wan import start_of, values_of

PARAMETERS = ("x", "t", "dit_cond_dict", "kv_cache", "crossattn_cache", "current_start", "max_attention_size")


class LingBotWorld(ListedLatents):
    """Give the composed pipeline, its generation stage, or the bare transformer (then sigma is t / 1000)."""

    name, context_kind = "lingbot-world", "rolling KV cache, K after RoPE"
    models = ("LingBot-World 2 causal-fast (FastVideo)",)
    constructors = (
        "fastvideo.pipelines.basic.lingbotworld2.causal_fast_pipeline:LingBotWorld2CausalFastGenerationStage",
    )
    takes = frozenset({"judge", "hide", "commit", "correct", "settle"})

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer by its forward, and self attention that calls its module's ``attention``."""
        stage = stage_of(model, _refusal)
        transformer: Any = getattr(stage, "transformer", stage)
        if reason := _refusal(transformer):
            taken = tokentrim.parameters_of(transformer) if isinstance(transformer, nn.Module) else ()
            return NoMatch(reason, sum(name in taken for name in PARAMETERS) / len(PARAMETERS))
        return Match(transformer, (int(transformer.patch_size[1]), int(transformer.patch_size[2])))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the module-global ``attention``, which only self attention calls."""
        self.stage = stage_of(model, _refusal)
        self.transformer: Any = getattr(self.stage, "transformer", self.stage)
        self.layers = layers_of(self.transformer, "blocks", "self_attn")
        self.commits = Commits(self.stage, patches)
        patches.tap(home_of(self.layers[0]), "attention", refuse=("q_lens", "k_lens"))

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one call; one whose tokens have noise levels of their own is none of the stage's."""
        given, timestep = arguments["x"], arguments["t"]
        if given is None or timestep is None or timestep.ndim != 1:
            words = "call it as its stage does: latents as x=[...], one timestep a sample as t="
            raise tokentrim.UnsupportedContextError(words)
        self.require_entries(arguments["kv_cache"])
        latents = torch.stack([one.transpose(0, 1) for one in given])
        start = start_of(arguments) // self.rows_per_frame(latents)
        return Call(latents, start, values_of(arguments["kv_cache"]), timestep, arguments=arguments)


def _refusal(transformer: Any) -> str:
    """Why this is not LingBot-World's transformer; empty if it is."""
    layer = next(iter(layers_of(transformer, "blocks", "self_attn")), None)
    if not isinstance(transformer, nn.Module) or not hasattr(layer, "sink_size") or not home_of(layer, "attention"):
        return "no transformer (nor a stage or pipeline with one) whose blocks[i].self_attn has sink_size and attention"
    return lacks(transformer, PARAMETERS, "the transformer's forward")


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for LingBot-World 2."""
    return [LingBotWorld]
