"""FramePack in diffusers (``HunyuanVideoFramepackPipeline``), both samplers.

A section of the video is one chunk. The transformer gets the history at three scales (1x, 2x, 4x) and a pinned first
frame, and embeds them before the section's own tokens. ``vanilla`` sampling runs forward in time. With
``inverted_anti_drifting`` the last section is made first: history is then the future, frames count back from the end
(-1 is the video's last latent frame), and the chunk compared with is the one that follows in time.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokentrim_hooks import Adapter, Match, NoMatch, Patches, SessionError, hookimpl, layers_of, strand

from ._diffusers import dispatcher_of, lacking, recognised, share_of
from ._packed_history import PackedCall, PackedHistory, Packing


class FramePack(PackedHistory):
    """Packed history of 1x, 2x and 4x frames in joint attention with the text."""

    name = "framepack"
    models = ("FramePack and FramePack-F1 (diffusers)",)
    constructors = ("diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack:HunyuanVideoFramepackPipeline",)

    clean, twice, four = "latents_clean", "latents_history_2x", "latents_history_4x"
    """Names of the arguments: first frame and 1x history, 2x history, 4x history,"""
    frames, twice_frames, image = "indices_latents", "indices_latents_history_2x", "image_embeds"
    """frame indices of the section and of the 2x history, embedding of the first frame."""

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer, given itself or as a pipeline's ``transformer``."""
        transformer: Any = getattr(model, "transformer", model)
        if not isinstance(transformer, nn.Module):
            return NoMatch("neither a module nor a pipeline with a .transformer module")
        names = (cls.clean, cls.twice, cls.four, cls.frames, cls.twice_frames, cls.image, "encoder_attention_mask")
        lacks = lacking(transformer, names)
        if lacks:
            return NoMatch(lacks, share_of(transformer, names))
        if getattr(transformer, "clean_x_embedder", None) is None:
            return NoMatch("the transformer has no clean_x_embedder, so it reads no history", near=1.0)
        config: Any = transformer.config
        patch_size = (config.patch_size_t, config.patch_size, config.patch_size)
        return recognised(transformer, cls.attentions(transformer), patch_size, cls.home)

    @classmethod
    def home(cls, attention: nn.Module) -> Any:
        """The module with the attention function to tap, or None."""
        return dispatcher_of(attention)

    @classmethod
    def attentions(cls, transformer: Any) -> list[nn.Module]:
        """Joint attentions of the double and single stream blocks; the text refiner's are others."""
        lists = ("transformer_blocks", "single_transformer_blocks")
        return [layer for blocks in lists for layer in layers_of(transformer, blocks, "attn")]

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Videos of one picture may share its embedding; in one thread they come one after the other.

        Raises:
            SessionError: the calls of one section come from several threads, and none waits in the pipeline.
        """
        here, section = strand(self.pipeline), arguments[self.frames]
        if section is not None and self._strands.setdefault(section, weakref.ref(here))() is not here:
            raise SessionError(
                "the calls of one section come from several threads, so videos cannot be told apart.\n"
                "Patch the pipeline, not its transformer alone, or make all calls of a video in one thread."
            )
        return here, arguments[self.image]

    def attach(self, model: Any, patches: Patches) -> None:
        """Know, for all sessions, in which thread a section is made."""
        super().attach(model, patches)
        self._strands: Any = WeakTensorKeyDictionary()

    def parse(self, arguments: Mapping[str, Any]) -> PackedCall | None:
        """Read one call.

        Raises:
            SessionError: videos that share a picture's embedding take turns in one thread.
        """
        call = super().parse(arguments)
        if call is not None and not (call.step or call.stream):
            self._require_turns(arguments.get("guidance"))
        return call

    def _require_turns(self, guidance: Any) -> None:
        """The pipeline makes a tensor ``guidance`` for every video: one that comes back was put off for another."""
        if not isinstance(guidance, Tensor) or (self._guidances and self._guidances[-1]() is guidance):
            return
        if any(seen() is guidance for seen in self._guidances):
            raise SessionError(
                "videos that were given one and the same tensor image_embeds take turns in one thread, and cannot be "
                "told apart.\nGive each its own (image_embeds.clone()), or make one after the other."
            )
        living = [seen for seen in self._guidances if seen() is not None]
        self._guidances = (*living, weakref.ref(guidance))

    def packing(self, arguments: Mapping[str, Any]) -> Packing | None:
        """History is ``[4x | 2x | first frame, 1x]``. The sampler makes new frame indices for every section and
        embeds the image once per video.
        """
        clean, twice, four = (arguments[name] for name in (self.clean, self.twice, self.four))
        if clean is None or twice is None or four is None:
            return None
        parts = ((four, 4), (twice, 2), (clean[:, :, 1:], 1))
        return Packing(parts, 1, section=arguments[self.frames], video=arguments[self.image])

    def begin(self, packing: Packing, arguments: Mapping[str, Any]) -> int:
        """Frame indices live on the host and tell the direction; forward, history holds the given image."""
        self._lengths: list[tuple[Tensor, int]] = []
        section, history = arguments[self.frames].flatten(), arguments[self.twice_frames].flatten()
        self.inverted, self._gap = int(section[0]) < int(history[0]), int(section[0])
        return 0 if self.inverted else 1

    def starts_over(self, packing: Packing, arguments: Mapping[str, Any]) -> bool:
        """Whether a section is a video's first although the picture is the last one's.

        Backwards each section lies closer to the video's first frame than the one before, and the last one at it.
        Forwards history is blank but for the picture: the one host read of a section.
        """
        gap, self._gap = self._gap, int(arguments[self.frames].flatten()[0])
        if self.inverted:
            return gap <= 1 or self._gap > gap
        return not bool(packing.parts[1][0].any())

    _gap = 0
    _guidances: tuple[weakref.ref[Tensor], ...] = ()

    def others(self, call: PackedCall) -> int:
        """Image and text keys. With one sample the transformer cuts the text to its length, otherwise it masks."""
        text, image = call.arguments["encoder_hidden_states"], call.arguments[self.image]
        length = text.shape[1] if text.shape[0] > 1 else self._length(call.arguments["encoder_attention_mask"])
        return int(image.shape[1] + min(length, text.shape[1]))

    def _length(self, mask: Tensor) -> int:
        """Words that a text mask lets through; one host read per prompt."""
        for known, length in self._lengths:
            if known is mask:
                return length
        self._lengths.append((mask, int(mask[0].sum(dtype=torch.int))))
        return self._lengths[-1][1]


@hookimpl
def tokentrim_adapters() -> list[type[Adapter[Any]]]:
    """Built-in adapter for FramePack."""
    return [FramePack]
