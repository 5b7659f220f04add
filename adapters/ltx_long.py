"""LTX-Video in diffusers, long videos (``LTXI2VLongMultiPromptPipeline``).

A long video is made window by window. The tail of what is finished is *appended* to the window's own frames, softly
noised (``temporal_overlap_cond_strength``) and at the positions of the window's first frames; guidance frames and one
frame of negative time index, which stays for the whole video, may follow. A window is one chunk, the tail its context.
Both guidance branches go through the transformer in one batch; the conditional one is judged.

The transformer sees a flat row of tokens. Only the pipeline knows what they are, and says so in the call that builds
their coordinates, just before each transformer call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    UnsupportedContextError,
    home_of,
    hookimpl,
    lacks,
    layers_of,
)

from ._diffusers import PINNED, Heard, Overheard, recognised, sample_of, tap_dispatch, trouble

COORDINATES = "build_video_coords_for_window"
PARTS = ("latents", "overlap_len", "guiding_len", "negative_len")


@dataclass(frozen=True)
class Window:
    """One window: ``own`` frames from latent frame ``start`` on, then ``tail``, ``guiding`` and ``pinned`` frames.

    ``latents`` are the pipeline's for this window (``[1, C, F, H, W]``), the same object for all its steps.
    """

    latents: Tensor
    start: int
    own: int
    tail: int
    guiding: int
    pinned: int
    first: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in tokens."""
        return int(self.latents.shape[3]), int(self.latents.shape[4])


@dataclass
class Told(Heard):
    """The window that the pipeline is at, the coordinates of its next call, and how many calls it has made in it."""

    window: Window | None = None
    coordinates: Tensor | None = None
    step: int = -1


@dataclass(frozen=True, kw_only=True)
class WindowCall(Call):
    """A transformer call: denoising step ``step`` of a window."""

    window: Window
    step: int


class LTXLong(Adapter[WindowCall]):
    """Sliding windows with a tail of finished frames in the attention sequence."""

    name = "ltx-long"
    models = ("LTX-Video, LTXI2VLongMultiPromptPipeline (diffusers)",)
    context_kind = "tail of the finished video in the attention sequence, softly noised"
    constructors = (
        "diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt:LTXI2VLongMultiPromptPipeline",
    )

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the pipeline; the transformer alone does not know which of its tokens are finished."""
        transformer: Any = getattr(model, "transformer", None)
        if not isinstance(transformer, nn.Module):
            alone = bool(layers_of(model, "transformer_blocks", "attn1"))
            return NoMatch("not a pipeline with a .transformer module", near=alone / 2)
        home = _pipeline_home(model)
        if home is None or not hasattr(model, "_current_tile_T"):
            return NoMatch(f"the pipeline makes no temporal windows ({COORDINATES} and _current_tile_T are missing)")
        reason = lacks(getattr(home, COORDINATES), PARTS, COORDINATES)
        if reason:
            return NoMatch(reason, near=0.9)
        config: Any = transformer.config
        if config.patch_size != 1:
            return NoMatch("a token covers more than one latent pixel", near=1.0)
        return recognised(transformer, _self_attentions(transformer), (config.patch_size_t, 1, 1))

    def attach(self, model: Any, patches: Patches) -> None:
        """Listen to the pipeline; tap the dispatcher, which cross attention calls as well."""
        self.pipeline = model
        self._overheard = Overheard(model, Told)
        self._overheard.listen(patches, model, "prepare_latents", _begin_video)
        self._overheard.listen(patches, _pipeline_home(model), COORDINATES, self._follow)
        tap_dispatch(patches, _self_attentions(model.transformer))

    def _follow(self, told: Told, given: Mapping[str, Any], coordinates: Tensor) -> None:
        """Told before every transformer call what its tokens are."""
        told.coordinates, told.failure = coordinates, None
        if told.window is None or told.window.latents is not given["latents"]:
            told.window, told.step = self._next_window(told.window, given), -1
        told.step += 1

    def _next_window(self, last: Window | None, given: Mapping[str, Any]) -> Window:
        latents, own = given["latents"], int(self.pipeline._current_tile_T)
        tail, guiding, pinned = (int(given[name]) for name in PARTS[1:])
        start = 0 if last is None else last.start + last.own - tail
        if own + tail + guiding + pinned != latents.shape[2]:
            # A condition of strength zero is announced but not there: nothing in this window is surely context.
            tail, guiding, pinned = 0, int(latents.shape[2]) - own, 0
        return Window(latents, start, own, tail, guiding, pinned, last is None)

    def parse(self, arguments: Mapping[str, Any]) -> WindowCall | None:
        """Read one call; without coordinates from this pipeline's loop it is not a rollout's."""
        told = self._overheard.here
        window = told.window
        if arguments["video_coords"] is None or arguments["video_coords"] is not told.coordinates:
            return None
        self._overheard.require("windows")
        if window is None:
            return None
        reason = trouble(self.pipeline.transformer, _self_attentions(self.pipeline.transformer))
        if told.step == 0 and reason:
            raise UnsupportedContextError(reason)
        return WindowCall(
            _own(arguments["hidden_states"], window),
            start=window.start,
            commits=False,
            arguments=arguments,
            window=window,
            step=told.step,
        )

    def phase(self, call: WindowCall, seen: Seen) -> Phase:
        """A window begins at its first step. Nothing is committed: the tail is read anew at every step."""
        return Phase.FIRST if call.step == 0 else Phase.REFINE

    def restarts(self, call: WindowCall, seen: Seen) -> bool:
        """The first window begins a new video."""
        return call.window.first

    def prediction(self, call: WindowCall, output: Any) -> Tensor:
        """x0 = x - sigma v. The noise level is a token's own: conditioned tokens have less."""
        sigma = _own(call.arguments["timestep"].float() / 1000, call.window)
        return call.latents.float() - sigma * _own(sample_of(output), call.window).float()

    def context(self, call: WindowCall) -> KeyLayout:
        """Keys of self attention: the window's frames, then the tail, whose frames the window makes anew."""
        window = call.window
        parts = (
            (Role.CURRENT, range(window.start, window.start + window.own)),
            (Role.CONTEXT, range(window.start, window.start + window.tail)),
            (Role.OTHER, range(window.guiding)),
            (Role.ANCHOR, range(PINNED, PINNED + window.pinned)),
        )
        return KeyLayout(tuple(Segment(role, frames, *window.size) for role, frames in parts if frames))


def _begin_video(told: Told, _given: Mapping[str, Any], _latents: Any) -> None:
    told.window = None


def _own(tokens: Tensor, window: Window) -> Tensor:
    """The window's own frames from a row of tokens ``[B, S, C]``, conditional branch: ``[1, F, C, H, W]``."""
    height, width = window.size
    own = tokens[-1:, : window.own * height * width]
    return own.reshape(1, window.own, height, width, -1).permute(0, 1, 4, 2, 3)


def _pipeline_home(model: object) -> Any:
    """The module of the pipeline, or of the class it derives from, in which the loop lives; None if it is no such."""
    homes = (home_of(kind, COORDINATES) for kind in type(model).__mro__)
    return next(filter(None, homes), None)


def _self_attentions(transformer: nn.Module) -> list[nn.Module]:
    return layers_of(transformer, "transformer_blocks", "attn1")


@hookimpl
def tokentrim_adapters() -> list[type[Adapter[Any]]]:
    """Built-in adapter for long LTX videos."""
    return [LTXLong]
