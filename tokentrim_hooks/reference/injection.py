"""Known drift, planted into a true video in graded strength, to see what each measure makes of it.

An injection is a function of a scene and a strength in 0..1 that returns the spoilt video ``[B, F, 3, 32, 32]``. Drift
of the whole picture leaves sprites recognisable at full strength: what measures say of sprites shall be about sprites.
These are moved by taking them off the picture and drawing them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, pad

from tokentrim_hooks.reference.scenes import SIZE, Scene

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
WIDE = 15
"""Pixels of the window whose uncovered part fills the hole that a sprite leaves; a sprite is at most 12 wide."""


@dataclass(frozen=True)
class Injection:
    """One kind of drift: its name, what it does at strength 1, and the function."""

    name: str
    what: str
    inject: Callable[[Scene, float], Tensor]


def fading(scene: Scene, strength: float) -> Tensor:
    """All pixels towards grey."""
    return scene.video * (1 - 0.45 * strength)


def burning(scene: Scene, strength: float) -> Tensor:
    """All pixels away from grey, out of the range too."""
    return scene.video * (1 + 0.6 * strength)


def brightening(scene: Scene, strength: float) -> Tensor:
    """All pixels lighter."""
    return scene.video + 0.3 * strength


def turning(scene: Scene, strength: float) -> Tensor:
    """All hues turned; the RGB cube about its grey axis."""
    angle = math.radians(30 * strength)
    side = math.sin(angle) / math.sqrt(3)
    cross = torch.tensor([[0.0, -side, side], [side, 0.0, -side], [-side, side, 0.0]])
    turn = math.cos(angle) * torch.eye(3) + (1 - math.cos(angle)) / 3 + cross
    return torch.einsum("dc,bfchw->bfdhw", turn, scene.video)


def blur(scene: Scene, strength: float) -> Tensor:
    """Gaussian blur."""
    axis = torch.arange(-6, 7, dtype=torch.float32)
    kernel = torch.softmax(-axis.square() / (2 * max(2 * strength, 1e-3) ** 2), dim=0)
    rows = pad(scene.video, (6, 6, 6, 6, 0, 0), mode="replicate").unfold(4, 13, 1) @ kernel
    return rows.unfold(3, 13, 1) @ kernel


def noise(scene: Scene, strength: float) -> Tensor:
    """White noise on the background, the same in all frames."""
    draws = torch.randn(scene.video[:, :1].shape, generator=torch.Generator().manual_seed(0))
    return scene.video + 0.2 * strength * draws * (1 - scene.masks.sum(2, keepdim=True))


def flickering(scene: Scene, strength: float) -> Tensor:
    """Every second frame brighter, the others darker."""
    sign = 1 - 2 * (torch.arange(scene.video.shape[1]) % 2)
    return scene.video + 0.15 * strength * sign[:, None, None, None]


def freezing(scene: Scene, strength: float) -> Tensor:
    """Time runs slower."""
    times = torch.arange(scene.video.shape[1]) * (1 - strength)
    return scene.video[:, times.long()]


def melting(scene: Scene, strength: float) -> Tensor:
    """Sprites flattened, their width and place as before."""
    x, y = _pixels(scene)
    middle = scene.positions[..., 1, None, None]
    return _drawn(scene, x, middle + (y - middle) / (1 - 0.5 * strength))


def displacing(scene: Scene, strength: float) -> Tensor:
    """Sprites' paths turned about the middle of the frame: as fast, as far from each other, somewhere else."""
    angle = torch.tensor(math.radians(60 * strength))
    dx, dy = (scene.positions - (SIZE - 1) / 2).unbind(-1)
    way = dx * (angle.cos() - 1) - dy * angle.sin(), dx * angle.sin() + dy * (angle.cos() - 1)
    x, y = _pixels(scene)
    return _drawn(scene, x - way[0][..., None, None], y - way[1][..., None, None])


def removing(scene: Scene, strength: float) -> Tensor:
    """No sprites in the last frames."""
    frames = scene.video.shape[1]
    gone = torch.arange(frames) >= frames * (1 - strength)
    return torch.where(gone[:, None, None, None], without_sprites(scene), scene.video)


def without_sprites(scene: Scene) -> Tensor:
    """The background alone; behind a sprite the mean of what can be seen around it."""
    covered = scene.masks.sum(2, keepdim=True)
    clear = covered < 0.9
    # At a soft edge the background shows through, and can be had exactly.
    shown = (scene.video - _painted(scene.masks, scene)) / (1 - covered).clamp(min=0.1)
    seen, share = (
        avg_pool2d(part.flatten(0, 1), WIDE, stride=1, padding=WIDE // 2).unflatten(0, clear.shape[:2])
        for part in (shown * clear, clear.float())
    )
    return torch.where(clear, shown, seen / share)


INJECTIONS = (
    Injection("fading", "contrast and colour times 0.55", fading),
    Injection("burning", "contrast and colour times 1.6", burning),
    Injection("brightening", "0.3 added to all pixels (of a range of 2)", brightening),
    Injection("turning hues", "hues turned by 30 degrees", turning),
    Injection("blur", "Gaussian blur of 2 pixels", blur),
    Injection("noise", "white noise of 0.2 on the background, the same in all frames", noise),
    Injection("flicker", "every second frame brighter by 0.15, the others darker", flickering),
    Injection("freezing", "time runs slower, at last stands still", freezing),
    Injection("melting", "sprites flattened to half their height, as wide as before", melting),
    Injection("displacing", "sprites' paths turned by 60 degrees about the middle of the frame", displacing),
    Injection("removing", "no sprites in the last frames, at last in none", removing),
)


def _pixels(scene: Scene) -> tuple[Tensor, Tensor]:
    """Coordinates x and y of every pixel, [32, 32] each."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    return axis.expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)


def _drawn(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    """The background with sprites whose pixels come from ``x`` and ``y`` of their masks, [B, F, n, 32, 32] each."""
    x, y = torch.broadcast_tensors(x, y)
    grid = torch.stack([x, y], dim=-1).flatten(0, 2) / ((SIZE - 1) / 2) - 1
    moved = grid_sample(scene.masks.flatten(0, 2)[:, None], grid, align_corners=True)
    masks = moved.view_as(scene.masks)
    masks = masks / masks.sum(2, keepdim=True).clamp(min=1)
    return without_sprites(scene) * (1 - masks.sum(2, keepdim=True)) + _painted(masks, scene)


def _painted(masks: Tensor, scene: Scene) -> Tensor:
    """The sprites' colours where ``masks`` [B, F, n, H, W] are, [B, F, 3, H, W]."""
    return torch.einsum("bfnhw,bnc->bfchw", masks, scene.colors)
