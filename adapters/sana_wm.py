"""SANA-WM's second stage in diffusers (``SanaWMLTX2Refiner``): the refiner, three frames at a time.

A chunk is refined in three Euler steps, then called once more at noise level 0 to be captured. Each layer has a cache
of its own: K and V of a sink (the raw first frame, K before RoPE and placed anew for every chunk) and of the history
(K after RoPE, the newest ten frames), which the pipeline joins anew when a chunk is captured. The keys of a call are
``[sink | history | the chunk]``: what is pruned is left out at the kernel, and no tensor of the caches is touched.

Which frames a call is about is told by its rotary embedding, which the pipeline has made for it just before. The call
that captures the sink is no chunk: what is refined is compared with what was refined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokentrim_hooks import (
    Adapter,
    Call,
    KeyLayout,
    Match,
    NoMatch,
    Patches,
    Role,
    Segment,
    UnsupportedContextError,
    bind,
    hookimpl,
    lacks,
    layers_of,
)

from ._diffusers import lacking, recognised, sample_of, share_of, tap_dispatch, trouble

PARAMETERS = ("hidden_states", "timestep", "video_rotary_emb", "kv_cache", "kv_cache_mode")
PLACES, PLACED = "build_rotary_emb_for_absolute_positions", ("frame_positions", "height", "width")
COMMIT, READS = "inject_and_capture_post_rope", ("inject", "inject_and_capture_post_rope")


class SanaWM(Adapter):
    """Chunks over a sink and a sliding history; give the pipeline, or the transformer of a loop of your own."""

    name = "sana-wm"
    models = ("SANA-WM refiner (diffusers)",)
    context_kind = "a sink, K before RoPE, and a sliding history, K after RoPE, joined anew after every chunk"
    takes = frozenset({"judge", "hide", "commit", "correct"})
    constructors = ("diffusers.pipelines.sana_wm.refiner:SanaWMLTX2Refiner",)
    transformer: Any
    _asked: tuple[int, ...] = ()

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the transformer by its forward and by the method that places its frames."""
        transformer: Any = getattr(model, "transformer", model)
        if not isinstance(transformer, nn.Module):
            return NoMatch("neither a transformer nor a pipeline with a .transformer module")
        reason = lacking(transformer, PARAMETERS) or lacks(getattr(transformer, PLACES, None), PLACED, f"{PLACES}()")
        if reason:
            return NoMatch(reason, share_of(transformer, PARAMETERS) / 2)
        config: Any = transformer.config
        if config.patch_size != 1:
            return NoMatch("a token covers more than one latent pixel", near=1.0)
        return recognised(transformer, _self_attentions(transformer), (config.patch_size_t, 1, 1))

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the dispatcher, which cross attention calls as well; note what each rotary embedding is for."""
        self.transformer = getattr(model, "transformer", model)
        # One for all videos: by the embedding itself, which lives as long as the calls that are given it.
        self._places: Any = WeakTensorKeyDictionary()
        patches.wrap(self.transformer, PLACES, self._note)
        tap_dispatch(patches, _self_attentions(self.transformer))

    def _note(self, wrapped: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embedding, given = wrapped(*args, **kwargs), bind(wrapped, args, kwargs)
        self._places[embedding[0]] = (tuple(given["frame_positions"]), int(given["height"]), int(given["width"]))
        return embedding

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """A video has a cache of its own."""
        return () if arguments["kv_cache"] is None else (arguments["kv_cache"],)

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one call that reads the cache; others capture a sink, or are no rollout's."""
        mode = arguments["kv_cache_mode"]
        if arguments["kv_cache"] is None or mode not in READS:
            return None
        frames, height, width = self._place(arguments)
        self._require_no_trouble(frames)
        latents = _unpacked(arguments["hidden_states"], len(frames), height, width)
        return Call(latents, frames[0], 0, arguments["timestep"], mode == COMMIT, arguments)

    def _require_no_trouble(self, frames: tuple[int, ...]) -> None:
        """Caches and parallelism may be switched on after the patch; ask once per chunk."""
        reason = "" if frames == self._asked else trouble(self.transformer, _self_attentions(self.transformer))
        if reason:
            raise UnsupportedContextError(reason)
        self._asked = frames

    def _place(self, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...], int, int]:
        embedding = arguments["video_rotary_emb"][0]
        if embedding not in self._places:
            raise UnsupportedContextError(
                "this call's video_rotary_emb was made before the patch, or elsewhere, so nobody knows its frames.\n"
                f"Make it with transformer.{PLACES}() once the model is patched."
            )
        place: tuple[tuple[int, ...], int, int] = self._places[embedding]
        return place

    def context(self, call: Call) -> KeyLayout:
        """Keys of self attention: the sink, the history, the chunk."""
        height, width = (int(size) for size in call.latents.shape[-2:])
        layer = call.arguments["kv_cache"].get(0)
        sink, history = (_frames(rows, height * width) for rows in (layer.get_sink(), layer.get_history()))
        parts = (
            (Role.ANCHOR, range(sink)),
            (Role.CONTEXT, range(call.start - history, call.start)),
            (Role.CURRENT, range(call.start, call.end)),
        )
        segments = tuple(Segment(role, frames, height, width) for role, frames in parts if frames)
        return KeyLayout(segments, attentions=len(self.transformer.transformer_blocks))

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 = x - sigma v, as the pipeline has it."""
        height, width = (int(size) for size in call.latents.shape[-2:])
        velocity = _unpacked(sample_of(output), call.frames, height, width)
        return call.latents.float() - self._sigma(call) * velocity.float()

    def with_prediction(self, call: Call, output: Any, x0: Tensor) -> Any:
        """The velocity of which the pipeline makes ``x0``."""
        velocity = (call.latents.float() - x0.float()) / self._sigma(call)
        tokens = _packed(velocity).to(sample_of(output).dtype)
        return (tokens,) if isinstance(output, tuple) else type(output)(sample=tokens)

    def carry_step(self, call: Call, earlier: Call, moved: Call, before: Tensor, after: Tensor) -> Tensor:
        """An Euler step keeps sigma's share of its own input, and takes the rest from x0."""
        kept = (self._sigma(call).flatten()[0] / self._sigma(earlier).flatten()[0]).double()
        noise, x0 = moved.latents.double() - earlier.latents.double(), after.double() - before.double()
        return (call.latents.double() + kept * noise + (1 - kept) * x0).to(call.latents.dtype)

    def with_latents(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Other latents, as tokens again."""
        tokens = _packed(latents)
        return (tokens, *args[1:]) if args else (), kwargs if args else {**kwargs, "hidden_states": tokens}

    def _sigma(self, call: Call) -> Tensor:
        """Noise level of each frame's first token ``[B, F, 1, 1, 1]``; all tokens of a chunk have one."""
        assert call.timestep is not None
        levels = call.timestep.float().reshape(call.timestep.shape[0], call.frames, 1, 1, -1)[..., :1]
        sigma: Tensor = levels / self.transformer.config.timestep_scale_multiplier
        return sigma


def _frames(rows: tuple[Tensor, Tensor] | None, per_frame: int) -> int:
    return 0 if rows is None else int(rows[1].shape[1]) // per_frame


def _unpacked(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Tokens ``[B, F * H * W, C]`` as ``[B, F, C, H, W]``."""
    return tokens.reshape(tokens.shape[0], frames, height, width, -1).permute(0, 1, 4, 2, 3)


def _packed(latents: Tensor) -> Tensor:
    """``[B, F, C, H, W]`` as tokens ``[B, F * H * W, C]``."""
    return latents.permute(0, 1, 3, 4, 2).flatten(1, 3)


def _self_attentions(transformer: nn.Module) -> list[nn.Module]:
    return layers_of(transformer, "transformer_blocks", "attn1")


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for the SANA-WM refiner."""
    return [SanaWM]
