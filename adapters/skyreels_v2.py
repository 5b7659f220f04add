"""SkyReels-V2 diffusion forcing (diffusers): text, image and video to video.

There is no KV cache: finished frames lie in front of the new ones in the transformer's own sequence, clean (or a
little noised, ``addnoise_condition``), and are encoded again at every step. A long video is made window by window,
each with the last ``overlap_history`` frames of the video as prefix. Within a window every frame follows its own
column of a step matrix. Synchronous (``ar_step=0``) all new frames go together and are one chunk; asynchronous, causal
blocks start one after the other, each is a chunk, and several are in flight.

The pipeline draws up that schedule on the host, so phases are known without asking the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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
    Seen,
    UnsupportedContextError,
    hookimpl,
)

from ._diffusers import home_of, tap_dispatch, trouble
from ._skyreels_window import Window, chunk_of, next_window

PREPARES = ("video_latents", "overlap_history_latent_frames", "long_video_iter")
PLANS = ("step_template", "ar_step", "num_pre_ready", "causal_block_size")


@dataclass(frozen=True)
class WindowCall(Call):
    """A transformer call at one row of a window's step matrix; ``newest`` is the ordinal of the chunk judged."""

    window: Window | None = None
    row: int = 0
    newest: int = 0


class SkyReelsV2(Adapter):
    """Diffusion-forcing pipelines of SkyReels-V2: context latents in the attention sequence."""

    name = "skyreels-v2"
    models = ("SkyReels-V2 diffusion forcing (diffusers: T2V, I2V, V2V)",)
    context_kind = "finished frames in the sequence, encoded anew at every step"
    constructors = tuple(
        f"diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing{kind}:SkyReelsV2DiffusionForcing{name}"
        for kind, name in (("", "Pipeline"), ("_i2v", "ImageToVideoPipeline"), ("_v2v", "VideoToVideoPipeline"))
    )

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise the pipeline; the transformer alone does not know which of its frames are finished."""
        if callable(getattr(model, "_set_ar_attention", None)):
            return NoMatch("this is the transformer alone, which does not know the schedule: patch the pipeline")
        transformer = getattr(model, "transformer", None)
        if not isinstance(transformer, nn.Module):
            return NoMatch("not a pipeline with a .transformer module")
        for method, names in (("prepare_latents", PREPARES), ("generate_timestep_matrix", PLANS)):
            missing = _missing(getattr(model, method, None), names)
            if missing:
                return NoMatch(f"no diffusion forcing here: {method}() lacks {', '.join(missing)}")
        layers = _self_attentions(transformer)
        patch_size = getattr(getattr(transformer, "config", None), "patch_size", None)
        if not layers or patch_size is None or int(patch_size[0]) != 1:
            return NoMatch("the transformer has no blocks[i].attn1, or its patch spans several frames")
        if not all(home_of(layer) for layer in layers):
            return NoMatch("an attention processor's module does not use dispatch_attention_fn")
        reason = _refusal(model)
        return NoMatch(reason) if reason else Match(transformer, (int(patch_size[1]), int(patch_size[2])))

    def attach(self, model: Any, patches: Patches) -> None:
        """Listen to the schedule on the pipeline; tap the dispatcher, which cross attention calls as well."""
        self.pipeline = model
        self.window: Window | None = None
        self.trouble: Exception | None = None
        self._seen: tuple[Window | None, int, int] = (None, 0, 0)
        patches.wrap(model, "prepare_latents", self._prepare)
        patches.wrap(model, "generate_timestep_matrix", self._plan)
        tap_dispatch(patches, _self_attentions(model.transformer))

    # ------------------------------------------------------------------------------------------ the schedule

    def _prepare(self, wrapped: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = wrapped(*args, **kwargs)
        last, self.window, self.trouble = self.window, None, None

        def learn() -> None:
            given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
            latents, _, prefix, length = result
            self.window = next_window(last, given, latents, prefix, int(length))

        self._follow(learn)
        return result

    def _plan(self, wrapped: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = wrapped(*args, **kwargs)

        def learn() -> None:
            given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
            if self.window is not None:
                self.window.plan(given, result, self.pipeline.scheduler.sigmas)

        self._follow(learn)
        return result

    def _follow(self, learn: Callable[[], None]) -> None:
        """Keep a failure for the next transformer call, where ``on_error`` decides what becomes of it."""
        try:
            learn()
        except Exception as failure:
            self.trouble = self.trouble or failure

    # ------------------------------------------------------------------------------------------ calls

    def parse(self, arguments: Mapping[str, Any]) -> WindowCall | None:
        """Read one transformer call; calls from outside the pipeline's loop are not a rollout's."""
        if self.trouble is not None:
            raise UnsupportedContextError("cannot follow this pipeline's schedule") from self.trouble
        window, latents = self.window, arguments["hidden_states"]
        row = None if window is None else window.row(getattr(self.pipeline, "current_timestep", None))
        if window is None or row is None:
            return None
        self._check(window)
        first, last = window.intervals[row]
        if latents.shape[2] != min(last, len(window.frames)) - first:
            return None
        newest = window.newest(row)
        block = window.blocks[newest]
        return WindowCall(
            chunk_of(latents, block, first),
            start=window.frames[block.first],
            stream=self._branch(window, row),
            commits=False,
            arguments=arguments,
            window=window,
            row=row,
            newest=newest,
        )

    def _branch(self, window: Window, row: int) -> int:
        """Guidance calls the transformer a second time at the same row: that is another branch."""
        last_window, last_row, count = self._seen
        branch = count + 1 if last_window is window and last_row == row else 0
        self._seen = (window, row, branch)
        return branch

    def _check(self, window: Window) -> None:
        """Caches and parallelism may be switched on after the patch; ask once a window."""
        if window.checked:
            return
        reason = _refusal(self.pipeline)
        if reason:
            raise UnsupportedContextError(reason)
        window.checked = True

    def phase(self, call: Call, seen: Seen) -> Phase:
        """The schedule says at which row a chunk begins. Nothing is ever committed: context is encoded anew."""
        window, row, newest = _place(call)
        return Phase.FIRST if window.blocks[newest].begin == row else Phase.REFINE

    def restarts(self, call: Call, seen: Seen) -> bool:
        """The first chunk of a window without history begins a new video, wherever the last one ended."""
        window, _, newest = _place(call)
        return window.opens and newest == 0

    def context(self, call: Call) -> KeyLayout:
        """Keys of self attention: the window's frames."""
        window, row, _ = _place(call)
        _, down, across = self.pipeline.transformer.config.patch_size
        height, width = call.latents.shape[-2:]
        return KeyLayout(window.segments(row, height // down, width // across))

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 of the newest chunk."""
        return self._clean(call, output, _place(call)[2])

    def reference(self, call: Call, output: Any) -> Tensor | None:
        """x0 of the chunk before from the same output, while it is in flight."""
        window, row, newest = _place(call)
        if newest == 0 or window.steps[row][window.blocks[newest - 1].first] >= window.clean:
            return None
        return self._clean(call, output, newest - 1)

    def accepted(self, call: Call) -> Tensor | None:
        """The chunk before: in the window's finished frames, or at the end of the video so far."""
        window, row, newest = _place(call)
        if newest == 0:
            before = window.previous()
            return None if before is None else before.expand(call.latents.shape[0], -1, -1, -1, -1)
        block, first = window.blocks[newest - 1], window.intervals[row][0]
        ready = window.steps[row][block.first] >= window.clean and block.first >= first
        return chunk_of(call.arguments["hidden_states"], block, first) if ready else None

    def _clean(self, call: Call, output: Any, ordinal: int) -> Tensor:
        """x0 = x - sigma v, with the scheduler's own sigma (the timesteps are truncated to whole numbers)."""
        window, row, _ = _place(call)
        block, first = window.blocks[ordinal], window.intervals[row][0]
        noisy, velocity = (chunk_of(t, block, first).float() for t in (call.arguments["hidden_states"], output[0]))
        return noisy - window.sigmas[window.steps[row][block.first] - 1] * velocity


def _place(call: Call) -> tuple[Window, int, int]:
    assert isinstance(call, WindowCall) and call.window is not None
    return call.window, call.row, call.newest


def _refusal(pipeline: Any) -> str:
    """Why this pipeline cannot be pruned as it is set up now; empty if it can."""
    reason = trouble(pipeline.transformer, _self_attentions(pipeline.transformer))
    scheduler = getattr(pipeline, "scheduler", None)
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", "flow_prediction")
    if kind != "flow_prediction" or not hasattr(scheduler, "sigmas"):
        return f"the scheduler predicts {kind!r} or has no sigmas; x0 is known for flow prediction only"
    return reason


def _missing(method: object, names: Sequence[str]) -> list[str]:
    if not callable(method):
        return list(names)
    return [name for name in names if name not in inspect.signature(method).parameters]


def _self_attentions(transformer: nn.Module) -> list[Any]:
    blocks: Any = getattr(transformer, "blocks", ())
    return [block.attn1 for block in blocks if hasattr(getattr(block, "attn1", None), "processor")]


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for SkyReels-V2."""
    return [SkyReelsV2]
