"""Procedural videos with known ground truth: a panning two-colour texture and two bouncing sprites.

Everything about a scene follows from a row of uniform random numbers in closed form, so a scene does not depend on how
many others, or how many frames, are asked for with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32
"""Height and width of a frame in pixels."""
SPRITES = 2
WAVES = 3
SHAPES = ("disc", "square", "diamond")


@dataclass(frozen=True)
class Scene:
    """A batch of videos and what is true of them. Pixels and colours are RGB in [-1, 1]; positions (x, y) in pixels.

    Attributes:
        video: [B, F, 3, 32, 32].
        positions: centres of the sprites [B, F, 2, 2].
        colors: colours of the sprites [B, 2, 3].
        masks: share of each pixel that a sprite covers, hidden parts excluded [B, F, 2, 32, 32].
        palette: the two colours of the texture [B, 2, 3].
        shapes: index into ``SHAPES`` for each sprite [B, 2].
    """

    video: Tensor
    positions: Tensor
    colors: Tensor
    masks: Tensor
    palette: Tensor
    shapes: Tensor


def scenes(seed: int, count: int, frames: int) -> Scene:
    """``count`` scenes of ``frames`` frames; equal arguments give equal scenes, float32 on the CPU."""
    draws = torch.rand(count, 4 * WAVES + 7 * SPRITES + 8, generator=torch.Generator().manual_seed(seed))
    waves, sprites, rest = draws.split([4 * WAVES, 7 * SPRITES, 8], dim=1)
    sprites = sprites.unflatten(1, (SPRITES, 7))
    time = torch.arange(frames, dtype=torch.float32)
    palette = _palette(rest[:, :6])
    video = _texture(waves.unflatten(1, (WAVES, 4)), rest[:, 6:], palette, time)
    # The second sprite's hue lies at least a quarter turn from the first one's, so that they can be told apart.
    hue = torch.stack([sprites[:, 0, 0], sprites[:, 0, 0] + 0.25 + 0.5 * sprites[:, 1, 0]], dim=1)
    colors, shapes = _saturated(hue), (sprites[..., 1] * len(SHAPES)).long()
    radius = 4.0 + 2.0 * sprites[..., 2]
    positions = _bounce(sprites[..., 3:], radius, time)
    masks = _masks(positions, radius, shapes)
    video = video * (1 - masks.sum(2, keepdim=True)) + torch.einsum("bfnhw,bnc->bfchw", masks, colors)
    return Scene(video, positions, colors, masks, palette, shapes)


def _palette(draws: Tensor) -> Tensor:
    """Two muted colours [B, 2, 3] from [B, 6]: one dark, one light, so that the texture is visible."""
    base = draws.unflatten(1, (2, 3)) * 0.5 - 0.25
    return base + torch.tensor([-0.3, 0.3])[:, None]


def _saturated(hue: Tensor) -> Tensor:
    """Fully saturated colour [..., 3] in [-1, 1] of ``hue`` [...] in turns."""
    phase = hue[..., None] + torch.tensor([0.0, 2 / 3, 1 / 3])
    return ((phase % 1.0 * 6 - 3).abs() - 1).clamp(0, 1) * 2 - 1


def _texture(waves: Tensor, pan: Tensor, palette: Tensor, time: Tensor) -> Tensor:
    """Sum of plane waves, squashed to a mix of two colours and moved at constant velocity; [B, F, 3, 32, 32]."""
    wavelength = 9 + 15 * waves[..., 0]
    direction, phase = 2 * math.pi * waves[..., 1], 2 * math.pi * waves[..., 2]
    vector = torch.stack([direction.cos(), direction.sin()], -1) * (2 * math.pi / wavelength)[..., None]
    heading, speed = 2 * math.pi * pan[:, 0], 0.3 + 0.7 * pan[:, 1]
    velocity = torch.stack([heading.cos(), heading.sin()], -1) * speed[:, None]
    axis = torch.arange(SIZE, dtype=torch.float32)
    travelled = torch.einsum("bwi,bi,f->bwf", vector, velocity, time)
    x, y = vector[..., 0, None] * axis, vector[..., 1, None] * axis
    angle = x[:, :, None, None] + y[:, :, None, :, None] + (phase[..., None] - travelled)[..., None, None]
    height = (angle.sin() * (0.6 + 0.8 * waves[..., 3])[..., None, None, None]).sum(1)
    mix = torch.sigmoid(2.5 * height)[:, :, None]
    dark, light = palette[:, None, :, :, None, None].unbind(2)
    return dark + (light - dark) * mix


def _bounce(draws: Tensor, radius: Tensor, time: Tensor) -> Tensor:
    """Positions [B, F, n, 2] of sprites that move straight and are reflected by the frame's borders."""
    span = SIZE - 1 - 2 * radius
    speed = (0.4 + 0.8 * draws[..., 2:]) * torch.where(draws[..., :2] < 0.5, -1.0, 1.0)
    begin = draws[..., :2] * 2 % 1 * span[..., None]
    path = (begin[:, None] + speed[:, None] * time[:, None, None]) % (2 * span[:, None, :, None])
    return radius[:, None, :, None] + torch.minimum(path, 2 * span[:, None, :, None] - path)


def _masks(positions: Tensor, radius: Tensor, shapes: Tensor) -> Tensor:
    """Coverage [B, F, n, 32, 32] with edges one pixel soft; a later sprite hides the earlier ones."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    dx, dy = (axis - positions[..., 0, None]).abs()[..., None, :], (axis - positions[..., 1, None]).abs()[..., None]
    distances = torch.stack([(dx**2 + dy**2).sqrt(), torch.maximum(dx, dy) * 1.12, (dx + dy) * 0.8], dim=-1)
    shape = shapes[:, None, :, None, None, None].expand(*distances.shape[:-1], 1)
    coverage = (radius[:, None, :, None, None] + 0.5 - distances.gather(-1, shape)[..., 0]).clamp(0, 1)
    hidden = torch.stack([coverage[:, :, 1], torch.zeros_like(coverage[:, :, 1])], dim=2)
    return coverage * (1 - hidden)
