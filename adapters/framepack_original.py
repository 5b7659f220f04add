"""FramePack and FramePack-F1 as their authors publish them (lllyasviel/FramePack): patch the ``transformer``.

The demo scripts keep the loop over sections to themselves and call ``sample_hunyuan`` once for each. Arguments carry
other names than in diffusers but mean the same, and the order of keys is the same. ``demo_gradio.py`` makes the last
section first, ``demo_gradio_f1.py`` runs forward. History lies on the CPU.

TeaCache counts calls and keeps the residual of the last one: it is started anew before a first step is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tokentrim_hooks import Adapter, Patches, UnsupportedContextError, home_of, hookimpl

from .framepack import FramePack

KERNEL = "attn_varlen_func"


class FramePackOriginal(FramePack):
    """The packed transformer of the original repository; one video at a time."""

    name = "framepack-original"
    takes = frozenset({"judge", "hide"})
    """No commit, no rows of a cache; its sampler integrates its own latents."""
    models = ("FramePack and FramePack-F1 (original repository)",)
    constructors = ("diffusers_helper.models.hunyuan_video_packed:HunyuanVideoTransformer3DModelPacked",)

    clean, twice, four = "clean_latents", "clean_latents_2x", "clean_latents_4x"
    frames, twice_frames, image = "latent_indices", "clean_latent_2x_indices", "image_embeddings"

    @classmethod
    def home(cls, attention: nn.Module) -> Any:
        """The module of the attention's processor, if it has the repository's own kernel function."""
        return home_of(getattr(attention, "processor", None), KERNEL)

    def tap(self, patches: Patches) -> None:
        """Tap the kernel. With several samples it gets sequence lengths of packed keys, and is refused."""
        attentions = self.attentions(self.transformer)
        patches.tap(self.home(attentions[0]), KERNEL, refuse=("cu_seqlens_kv",), within=attentions)

    def replay(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the transformer again, with TeaCache as the sampler had it before the section's first step."""
        model = self.transformer
        if getattr(model, "enable_teacache", False):
            if model.cnt != 1:
                raise UnsupportedContextError(
                    "TeaCache is on and was not started anew with this section: call "
                    "transformer.initialize_teacache() before each section, as the demo scripts do"
                )
            model.initialize_teacache(True, num_steps=model.num_steps, rel_l1_thresh=model.rel_l1_thresh)
        return denoiser(*args, **kwargs)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter[Any]]]:
    """Built-in adapter for the original FramePack."""
    return [FramePackOriginal]
