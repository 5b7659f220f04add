"""FastVideo's stages: where their transformer is, how they turn flow into x0, which call commits it.

The stage computes x0 = x_t - sigma * flow in float64, with sigma that of its scheduler's nearest timestep.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokentrim_hooks import Call, Patches, Phase, Seen, default_phase, nearest_sigma, shares_storage, x0_of_flow

from ._wan import CausalWan, rows_per_frame

CONVERT = "_convert_flow_pred_to_x0"
AT_ONCE = 16
"""How many videos may take turns on a stage."""


def stage_of(model: Any, refusal: Callable[[Any], str]) -> Any:
    """The stage of a composed pipeline whose transformer is not refused, else one whose is; else the model itself."""
    stages = getattr(model, "stages", None)
    if not isinstance(stages, Sequence):
        return model
    having = [stage for stage in stages if isinstance(getattr(stage, "transformer", None), nn.Module)]
    fitting = [stage for stage in having if not refusal(stage.transformer)]
    return next(iter([*fitting, *having]), model)


def sigma_of(stage: Any, timestep: Tensor) -> Tensor:
    """Noise level of each timestep, float64: by the stage's scheduler now (users change it); else timestep / 1000."""
    scheduler: Any = getattr(stage, "scheduler", None)
    return timestep.double() / 1000 if scheduler is None else nearest_sigma(scheduler, timestep).double()


def flow_of(x0: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """The flow of which the stage makes ``x0``; ``sigma`` is nowhere 0."""
    return ((latents.double() - x0.double()) / _spread(sigma)).to(x0.dtype)


def _spread(sigma: Tensor) -> Tensor:
    return sigma.view(*sigma.shape, *[1] * (5 - sigma.ndim))


def kept_of(stage: Any, latents: Tensor, timestep: Tensor) -> Tensor:
    """The share of x0 in re-noised latents, as ``scheduler.add_noise`` has it; ``latents`` gives shape and type.

    Not one minus :func:`sigma_of`: where timesteps were rounded to integers many sigmas share one, and the scheduler
    does not take the first.
    """
    scheduler: Any = getattr(stage, "scheduler", None)
    if scheduler is None:
        return 1 - _spread(sigma_of(stage, timestep))
    zero = latents.new_zeros(latents.shape).double()
    return cast(Tensor, scheduler.add_noise(zero + 1, zero, timestep.flatten()))


class Commits:
    """Tells commits from denoising steps without a look at the device: a stage commits an x0 that it has just made.

    Not the last one alone: videos that take turns on one stage each have theirs.

    Of a loop that makes x0 elsewhere the timestep is read, until the number of a chunk's steps is known.
    """

    def __init__(self, stage: Any, patches: Patches) -> None:
        self._watched = hasattr(stage, CONVERT)
        self._made: deque[weakref.ref[Tensor]] = deque(maxlen=AT_ONCE)
        if self._watched:
            patches.wrap(stage, CONVERT, self._note)

    def _note(self, wrapped: Any, _stage: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x0 = wrapped(*args, **kwargs)
        self._made.append(weakref.ref(x0))
        return x0

    def phase(self, call: Call, seen: Seen, latents: Tensor) -> Phase:
        """What ``call`` does, whose ``latents`` are those that the sampler holds."""
        phase = default_phase(call, seen)
        if phase is Phase.FIRST:
            return phase
        if self._watched:
            commits = any(shares_storage(latents, made()) for made in self._made)
        else:
            commits = phase is Phase.COMMIT or (not seen.usual_steps and _clean(call))
        return Phase.COMMIT if commits else Phase.REFINE


def _clean(call: Call) -> bool:
    return call.timestep is not None and not call.timestep.any()


class ListedLatents(CausalWan):
    """Self-Forcing's cache behind a transformer of Wan's own signature: ``x`` a list of ``[C, F, H, W]``, one timestep
    a sample in ``t``; it answers flow, as such a list, and the stage goes on with nothing but the x0 that it makes.
    """

    stage: Any
    transformer: Any
    commits: Commits

    def phase(self, call: Call, seen: Seen) -> Phase:
        """By the very x0 that the stage made."""
        return self.commits.phase(call, seen, call.arguments["x"][0])

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 from flow, in float64 as the stage computes it."""
        flow = torch.stack([one.transpose(0, 1) for one in output])
        return x0_of_flow(flow, call.latents, sigma_of(self.stage, call.arguments["t"]))

    def with_prediction(self, call: Call, output: Any, x0: Tensor) -> Any:
        """The flow of which the stage makes ``x0``."""
        return [*flow_of(x0, call.latents, sigma_of(self.stage, call.arguments["t"])).transpose(1, 2)]

    def with_latents(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Other latents, as a list again."""
        return args, {**kwargs, "x": [*latents.transpose(1, 2)]}

    def carry(self, call: Call, before: Tensor, after: Tensor) -> Tensor:
        """The same noise, with the share of x0 that the scheduler's ``add_noise`` keeps."""
        kept = kept_of(self.stage, call.latents, call.arguments["t"])
        return (call.latents.double() + kept * (after.double() - before.double())).to(call.latents.dtype)

    def rows_per_frame(self, latents: Tensor) -> int:
        """Spatial tokens, and so cache rows, of a latent frame of ``latents`` ``[..., H, W]``."""
        return rows_per_frame(self.transformer, latents)
