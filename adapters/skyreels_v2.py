"""SkyReels-V2 diffusion forcing (diffusers): text, image and video to video.

There is no KV cache: finished frames lie in front of the new ones in the transformer's own sequence, clean (or a
little noised, ``addnoise_condition``), and are encoded again at every step. A long video is made window by window,
each with the last ``overlap_history`` frames of the video as prefix. Within a window every frame follows its own
column of a step matrix. Synchronous (``ar_step=0``) all new frames go together and are one chunk; asynchronous, causal
blocks start one after the other, each is a chunk, and several are in flight.

The pipeline draws up that schedule on the host, so phases are known without asking the device.
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
    Seen,
    UnsupportedContextError,
    hookimpl,
    lacks,
    layers_of,
)

from ._diffusers import Heard, Overheard, recognised, tap_dispatch, trouble
from ._skyreels_window import Window, chunk_of, next_window

PREPARES = ("video_latents", "overlap_history_latent_frames", "long_video_iter")
PLANS = ("step_template", "ar_step", "num_pre_ready", "causal_block_size")


@dataclass
class Schedule(Heard):
    """The window that the pipeline is at, and the latest call: its window, row, and branch of guidance."""

    window: Window | None = None
    latest: tuple[Window | None, int, int] = (None, 0, 0)


@dataclass(frozen=True, kw_only=True)
class WindowCall(Call):
    """A transformer call at one row of a window's step matrix; ``newest`` is the ordinal of the chunk judged."""

    window: Window
    row: int
    newest: int


class SkyReelsV2(Adapter[WindowCall]):
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
            return NoMatch(
                "this is the transformer alone, which does not know the schedule: patch the pipeline", near=1.0
            )
        transformer = getattr(model, "transformer", None)
        if not isinstance(transformer, nn.Module):
            return NoMatch("not a pipeline with a .transformer module")
        for method, names in (("prepare_latents", PREPARES), ("generate_timestep_matrix", PLANS)):
            reason = lacks(getattr(model, method, None), names, f"{method}()")
            if reason:
                return NoMatch(f"no diffusion forcing here: {reason}")
        patch_size = getattr(getattr(transformer, "config", None), "patch_size", None)
        if patch_size is None:
            return NoMatch("the transformer's configuration has no patch_size", near=0.9)
        reason = _refusal(model)
        return (
            NoMatch(reason, near=1.0) if reason else recognised(transformer, _self_attentions(transformer), patch_size)
        )

    def attach(self, model: Any, patches: Patches) -> None:
        """Listen to the schedule on the pipeline; tap the dispatcher, which cross attention calls as well."""
        self.pipeline = model
        self._overheard = Overheard(model, Schedule)
        self._overheard.listen(patches, model, "prepare_latents", _prepare)
        self._overheard.listen(patches, model, "generate_timestep_matrix", self._plan)
        tap_dispatch(patches, _self_attentions(model.transformer))

    # ------------------------------------------------------------------------------------------ the schedule

    def _plan(self, schedule: Schedule, given: Mapping[str, Any], planned: Any) -> None:
        """The window's step matrix is drawn up."""
        if schedule.window is not None:
            schedule.window.plan(given, planned, self.pipeline.scheduler.sigmas)

    @property
    def window(self) -> Window | None:
        """The one that the pipeline is at, in this thread."""
        return self._overheard.here.window

    # ------------------------------------------------------------------------------------------ calls

    def parse(self, arguments: Mapping[str, Any]) -> WindowCall | None:
        """Read one transformer call; calls from outside the pipeline's loop are not a rollout's."""
        self._overheard.require("schedule")
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
        schedule = self._overheard.here
        last_window, last_row, count = schedule.latest
        branch = count + 1 if last_window is window and last_row == row else 0
        schedule.latest = (window, row, branch)
        return branch

    def _check(self, window: Window) -> None:
        """Caches and parallelism may be switched on after the patch; ask once per window."""
        if window.checked:
            return
        reason = _refusal(self.pipeline)
        if reason:
            raise UnsupportedContextError(reason)
        window.checked = True

    def phase(self, call: WindowCall, seen: Seen) -> Phase:
        """The schedule says at which row a chunk begins. Nothing is ever committed: context is encoded anew."""
        return Phase.FIRST if call.window.blocks[call.newest].begin == call.row else Phase.REFINE

    def restarts(self, call: WindowCall, seen: Seen) -> bool:
        """The first chunk of a window without history begins a new video, wherever the last one ended."""
        return call.window.opens and call.newest == 0

    def context(self, call: WindowCall) -> KeyLayout:
        """Keys of self attention: the window's frames."""
        _, down, across = self.pipeline.transformer.config.patch_size
        height, width = call.latents.shape[-2:]
        return KeyLayout(call.window.segments(call.row, height // down, width // across))

    def prediction(self, call: WindowCall, output: Any) -> Tensor:
        """x0 of the newest chunk."""
        return _clean(call, output, call.newest)

    def in_flight(self, call: WindowCall, output: Any) -> Tensor | None:
        """x0 of the chunk before from the same output, while it is in flight."""
        window, before = call.window, call.newest - 1
        if before < 0 or window.steps[call.row][window.blocks[before].first] >= window.clean:
            return None
        return _clean(call, output, before)

    def accepted(self, call: WindowCall) -> Tensor | None:
        """The chunk before: in the window's finished frames, or at the end of the video so far."""
        window, row = call.window, call.row
        if call.newest == 0:
            before = window.previous()
            return None if before is None else before.expand(call.latents.shape[0], -1, -1, -1, -1)
        block, first = window.blocks[call.newest - 1], window.intervals[row][0]
        ready = window.steps[row][block.first] >= window.clean and block.first >= first
        return chunk_of(call.arguments["hidden_states"], block, first) if ready else None


def _prepare(schedule: Schedule, given: Mapping[str, Any], prepared: Any) -> None:
    """A window begins. Until it is understood there is none."""
    last, schedule.window, schedule.failure = schedule.window, None, None
    latents, _, prefix, length = prepared
    schedule.window = next_window(last, given, latents, prefix, int(length))


def _clean(call: WindowCall, output: Any, chunk: int) -> Tensor:
    """x0 = x - sigma v, with the scheduler's own sigma (the timesteps are truncated to whole numbers)."""
    window, row = call.window, call.row
    block, first = window.blocks[chunk], window.intervals[row][0]
    noisy, velocity = (chunk_of(t, block, first).float() for t in (call.arguments["hidden_states"], output[0]))
    return noisy - window.sigmas[window.steps[row][block.first] - 1] * velocity


def _refusal(pipeline: Any) -> str:
    """Why this pipeline cannot be pruned as it is set up now; empty if it can."""
    reason = trouble(pipeline.transformer, _self_attentions(pipeline.transformer))
    scheduler = getattr(pipeline, "scheduler", None)
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", "flow_prediction")
    if kind != "flow_prediction" or not hasattr(scheduler, "sigmas"):
        return f"the scheduler predicts {kind!r} or has no sigmas; x0 is known for flow prediction only"
    return reason


def _self_attentions(transformer: nn.Module) -> list[nn.Module]:
    return layers_of(transformer, "blocks", "attn1")


@hookimpl
def tokentrim_adapters() -> list[type[Adapter[Any]]]:
    """Built-in adapter for SkyReels-V2."""
    return [SkyReelsV2]
