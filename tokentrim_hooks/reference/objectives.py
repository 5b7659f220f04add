"""One training step's clips, targets and loss. Videos here are [B, C, F, H, W], noise levels [B, F] in 0..1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.reference.model import CausalVideoModel
from tokentrim_hooks.reference.pipeline import STEPS
from tokentrim_hooks.reference.recipes import Phase, Recipe
from tokentrim_hooks.reference.scenes import CHUNK, scenes_at
from tokentrim_hooks.reference.tokens import DATA_STD

COPIES = 2
"""Noisy copies of a video that share one pass over the clean one."""
FIRST_WEIGHT = 0.1
"""Weight of the loss where there is nothing to continue from: capacity goes to continuation."""


@dataclass(frozen=True)
class Clip:
    """Videos [B, C, F, H, W], the ``index`` [F] of their frames, and how many frames nothing before them foretells."""

    video: Tensor
    index: Tensor
    given: int


def draw_clip(seed: int, phase: Phase, recipe: Recipe) -> Clip:
    """Draw clips; with a jump, three quarters of them go on at some later moment behind their first chunk."""
    index, given = torch.arange(phase.frames), CHUNK
    rng = torch.Generator().manual_seed(seed)
    if recipe.jump and torch.rand((), generator=rng) < 0.75:
        skipped = CHUNK * int(torch.randint(1, recipe.jump // CHUNK + 1, (), generator=rng))
        index = torch.cat([index[:CHUNK], index[CHUNK:] + skipped])
        given = 2 * CHUNK
    return Clip(scenes_at(seed, phase.batch, index.float()).video.transpose(1, 2), index, given)


def sampler_levels(batch: int, frames: int, chunk: int, rng: torch.Generator) -> Tensor:
    """Noise levels [B, F], one per chunk: the sampler's four, pure noise most often, for it decides most."""
    odds = torch.tensor([0.4, 0.2, 0.2, 0.2])
    chosen = torch.multinomial(odds, batch * (frames // chunk), replacement=True, generator=rng)
    return (torch.tensor(STEPS) / 1000)[chosen].view(batch, -1).repeat_interleave(chunk, 1)


def noised(video: Tensor, level: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """``video`` at noise ``level``, and the noise."""
    noise = torch.randn(video.shape, generator=rng)
    s = level[:, None, :, None, None]
    return (1 - s) * video + s * noise, noise


def flow_of(model: CausalVideoModel, noisy: Tensor, level: Tensor, context: Tensor, index: Tensor) -> Tensor:
    """Predicted flow of ``noisy`` (copies one after another) given ``context``, whose frames stand at ``index``."""
    with torch.autocast("cpu", torch.bfloat16):
        flow: Tensor = model(noisy, 1000 * level, clean_x=context, frame_index=index)
    return flow.float()


def flow_error(flow: Tensor, target: Tensor, level: Tensor, given: int) -> Tensor:
    """Mean squared error in units of what the network itself has to add; the ``given`` frames hardly count."""
    s = level[:, None, :, None, None]
    unit = DATA_STD / ((1 - s) ** 2 * DATA_STD**2 + s**2).sqrt()
    error = ((flow - target) / unit).square().unflatten(2, (COPIES, -1))
    ahead, first = error[:, :, :, given:].mean(), error[:, :, :, :given].mean()
    return (1 - FIRST_WEIGHT) * ahead + FIRST_WEIGHT * first


def own_prediction(x0: Tensor, level: Tensor, clip: Clip) -> Tensor:
    """What was predicted, for each frame by the copy that had more noise; the ``given`` frames are the truth."""
    (one, other), (level_one, level_other) = x0.detach().chunk(COPIES, dim=2), level.chunk(COPIES, dim=1)
    own = torch.where((level_one >= level_other)[:, None, :, None, None], one, other)
    own[:, :, : clip.given] = clip.video[:, :, : clip.given]
    return own
