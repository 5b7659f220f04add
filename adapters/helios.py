"""Helios in diffusers: ``HeliosPipeline`` and the modular Helios blocks, text, image and video to video.

The transformer gets long (4x), mid (2x) and short (1x) history, a pinned first frame before the short part, then the
chunk. History latents are sliced once per chunk and handed to all its calls; frame indices are made once per video.

The pyramid variants are refused: their first stages denoise the chunk at a fraction of its size, with noise levels
that end at the stage's own end point, so that their first prediction is neither on the history's grid nor an x0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks import Adapter, Match, NoMatch, UnsupportedContextError, hookimpl, layers_of

from ._diffusers import lacking, recognised, share_of
from ._packed_history import PackedHistory, Packing

HISTORY = ("latents_history_long", "latents_history_mid", "latents_history_short")
PARAMETERS = (*HISTORY, "indices_hidden_states", "indices_latents_history_mid", "indices_latents_history_short")
PYRAMID = "pyramid stages predict a stage's end point on a smaller grid, not x0: use single-stage Helios"
NO_INDICES = (
    "calls come without indices_hidden_states, so that videos cannot be told apart: pass them.\n"
    "The modular pipeline leaves out what forward does not name: wrap it with functools.wraps."
)


class Helios(PackedHistory):
    """Packed history of short, mid and long memory; text in cross attention."""

    name = "helios"
    models = ("Helios, single stage (diffusers, classic and modular)",)
    constructors = ("diffusers.pipelines.helios.pipeline_helios:HeliosPipeline",)

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer, given itself or as a pipeline's ``transformer``."""
        transformer: Any = getattr(model, "transformer", model)
        if not isinstance(transformer, nn.Module):
            return NoMatch("neither a module nor a pipeline with a .transformer module")
        lacks = lacking(transformer, PARAMETERS)
        if lacks:
            return NoMatch(lacks, share_of(transformer, PARAMETERS))
        if not all(hasattr(transformer, name) for name in ("patch_short", "patch_mid", "patch_long")):
            return NoMatch(
                "the transformer has no patch_short, patch_mid and patch_long, so it reads no history", near=1.0
            )
        sampler: Any = getattr(getattr(model, "scheduler", None), "config", None)
        if getattr(sampler, "stages", 1) > 1:
            return NoMatch(PYRAMID, near=1.0)
        config: Any = transformer.config
        return recognised(transformer, cls.attentions(transformer), config.patch_size)

    @classmethod
    def attentions(cls, transformer: Any) -> list[nn.Module]:
        """Self attention is ``attn1``; ``attn2`` reads the text."""
        return layers_of(transformer, "blocks", "attn1")

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Frame indices are made once per video."""
        return (arguments["indices_hidden_states"],)

    def packing(self, arguments: Mapping[str, Any]) -> Packing | None:
        """History is ``[long | mid | first frame, short]``."""
        long, mid, short = (arguments[name] for name in HISTORY)
        if long is None or mid is None or short is None:
            return None
        if arguments["hidden_states"].shape[-2:] != short.shape[-2:]:
            raise UnsupportedContextError(PYRAMID)
        video = arguments["indices_hidden_states"]
        if video is None:
            raise UnsupportedContextError(NO_INDICES)
        if self._video() is not video:
            self._pinned, self._filled = _look(long, mid, short, arguments)
        return Packing(((long, 4), (mid, 2), (short[:, :, self._pinned :], 1)), self._pinned, mid, video)

    def begin(self, packing: Packing, arguments: Mapping[str, Any]) -> int:
        """Always forward in time; history holds what an image or a video has given."""
        return self._filled

    _pinned = 0
    _filled = 0


def _look(long: Tensor, mid: Tensor, short: Tensor, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Pinned frames, and how many of the latest history frames are not blank: the one host read of a video.

    A pinned frame has an index of its own, before all history.
    """
    history = torch.cat([long, mid, short], dim=2)
    filled = (history != 0).any(dim=4).any(dim=3).any(dim=1).any(dim=0)
    ends = [arguments["indices_latents_history_mid"][0, -1:], arguments["indices_latents_history_short"][0, :1]]
    *flags, newest, first = torch.cat([filled.long(), *(end.to(filled.device) for end in ends)]).tolist()
    pinned = 0 if first == newest + 1 else 1
    del flags[len(flags) - short.shape[2] : len(flags) - short.shape[2] + pinned]
    blank = [place for place, flag in enumerate(flags) if not flag]
    return pinned, len(flags) - 1 - max(blank, default=-1)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter[Any]]]:
    """Built-in adapter for Helios."""
    return [Helios]
