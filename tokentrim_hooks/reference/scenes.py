"""Procedural videos with known ground truth: a soft two-colour texture and two bouncing sprites.

Everything about a scene follows from a row of uniform random numbers in closed form, so a scene does not depend on how
many others, or how many frames, are asked for with it: a longer video begins with the shorter one. The reference model
is trained on seeds from 1,000,000 on; smaller seeds are held out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SIZE = 32
"""Height and width of a frame in pixels."""
SPRITES = 2
WAVES = 3
SHAPES = ("disc", "square", "diamond")
CHUNK = 3
"""Frames of a chunk; cuts and stops fall on a chunk's first frame."""


@dataclass(frozen=True)
class Texture:
    """How the background looks and moves: ranges of wavelength [pixels] and speed [pixels per frame], contrast."""

    wavelengths: tuple[float, float]
    speeds: tuple[float, float]
    steepness: float


TEXTURES = {
    "soft": Texture(wavelengths=(12, 32), speeds=(0, 0), steepness=1.5),
    "hard": Texture(wavelengths=(9, 24), speeds=(0.3, 1.0), steepness=2.5),
}
"""``soft`` stands still and a small model learns to keep it; ``hard`` is fine, sharp and always pans."""


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


def scenes(
    seed: int,
    count: int,
    frames: int,
    kind: str = "soft",
    pan: float | None = None,
    cut: int | None = None,
    stop: int | None = None,
) -> Scene:
    """Draw scenes; equal arguments give equal scenes, float32 on the CPU.

    Args:
        seed, count, frames: which scenes, how many, how long (any length).
        kind: ``"soft"`` (what the reference model was trained on) or ``"hard"`` (a fine, sharp, panning texture).
        pan: speed of the texture in pixels per frame, in a direction that the seed chooses; None: the kind's own.
        cut: index of the chunk with which the same two sprites are elsewhere, before another texture (``palette`` is
            the first texture's).
        stop: index of the chunk with which the first sprite stands still for good. Nothing is wrong with that, so a
            detector that flags it gives a false alarm.
    """
    return scenes_at(seed, count, torch.arange(frames, dtype=torch.float32), kind, pan, cut, stop)


def scenes_at(
    seed: int,
    count: int,
    time: Tensor,
    kind: str = "soft",
    pan: float | None = None,
    cut: int | None = None,
    stop: int | None = None,
) -> Scene:
    """As :func:`scenes`, at any moments ``time`` [F] in frames, in ascending order."""
    texture = _textured(kind, pan)
    scene = _drawn(_draws(seed, count), time, texture, stop)
    if cut is None:
        return scene
    return _joined(scene, _drawn(_cut_draws(seed, count), time, texture, stop), int((time < cut * CHUNK).sum()))


def _textured(kind: str, pan: float | None) -> Texture:
    if kind not in TEXTURES:
        raise ValueError(f"no scenes of kind {kind!r}; there are {', '.join(TEXTURES)}")
    texture = TEXTURES[kind]
    return texture if pan is None else replace(texture, speeds=(pan, pan))


def _draws(seed: int, count: int) -> Tensor:
    """A row of uniform numbers for each scene, [B, 34]: waves, sprites, then palette and pan."""
    return torch.rand(count, 4 * WAVES + 7 * SPRITES + 8, generator=torch.Generator().manual_seed(seed))


def _cut_draws(seed: int, count: int) -> Tensor:
    """Draws of the scene behind a cut: hue, shape and size of the sprites stay, all else is new."""
    # Far from the seeds that anybody counts up to, and still within the 32 bits that a generator looks at.
    before, after = _draws(seed, count), _draws(seed + 2**30, count)
    for sprite in range(SPRITES):
        same = slice(4 * WAVES + 7 * sprite, 4 * WAVES + 7 * sprite + 3)
        after[:, same] = before[:, same]
    return after


def _drawn(draws: Tensor, time: Tensor, texture: Texture, stop: int | None) -> Scene:
    """Scenes from their ``draws`` [B, 34] at ``time`` [F] in frames."""
    waves, sprites, rest = draws.split([4 * WAVES, 7 * SPRITES, 8], dim=1)
    sprites = sprites.unflatten(1, (SPRITES, 7))
    palette = _palette(rest[:, :6])
    video = _background(waves.unflatten(1, (WAVES, 4)), rest[:, 6:], palette, time, texture)
    # The second sprite's hue lies at least a quarter turn from the first one's, so that they can be told apart.
    hue = torch.stack([sprites[:, 0, 0], sprites[:, 0, 0] + 0.25 + 0.5 * sprites[:, 1, 0]], dim=1)
    colors, shapes = _saturated(hue), (sprites[..., 1] * len(SHAPES)).long()
    radius = 4.0 + 2.0 * sprites[..., 2]
    positions = _bounce(sprites[..., 3:], radius, _own_time(time, stop))
    masks = _masks(positions, radius, shapes)
    video = video * (1 - masks.sum(2, keepdim=True)) + torch.einsum("bfnhw,bnc->bfchw", masks, colors)
    return Scene(video, positions, colors, masks, palette, shapes)


def _own_time(time: Tensor, stop: int | None) -> Tensor:
    """Each sprite's time [F, n]: the first one's stands still from chunk ``stop`` on."""
    if stop is None:
        return time[:, None].expand(-1, SPRITES)
    return torch.stack([time.clamp(max=float(stop * CHUNK)), *[time] * (SPRITES - 1)], dim=1)


def _joined(before: Scene, after: Scene, frame: int) -> Scene:
    """``before`` up to ``frame``, then ``after``."""

    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[:, :frame], b[:, frame:]], dim=1)

    return replace(
        before,
        video=join(before.video, after.video),
        positions=join(before.positions, after.positions),
        masks=join(before.masks, after.masks),
    )


def _palette(draws: Tensor) -> Tensor:
    """Two muted colours [B, 2, 3] from [B, 6]: one dark, one light, so that the texture is visible."""
    base = draws.unflatten(1, (2, 3)) * 0.5 - 0.25
    return base + torch.tensor([-0.3, 0.3])[:, None]


def _saturated(hue: Tensor) -> Tensor:
    """Fully saturated colour [..., 3] in [-1, 1] of ``hue`` [...] in turns."""
    phase = hue[..., None] + torch.tensor([0.0, 2 / 3, 1 / 3])
    return ((phase % 1.0 * 6 - 3).abs() - 1).clamp(0, 1) * 2 - 1


def _background(waves: Tensor, pan: Tensor, palette: Tensor, time: Tensor, texture: Texture) -> Tensor:
    """Sum of plane waves, squashed to a mix of two colours and moved at constant velocity; [B, F, 3, 32, 32]."""
    (shortest, longest), (slowest, fastest) = texture.wavelengths, texture.speeds
    wavelength = shortest + (longest - shortest) * waves[..., 0]
    direction, phase = 2 * math.pi * waves[..., 1], 2 * math.pi * waves[..., 2]
    vector = torch.stack([direction.cos(), direction.sin()], -1) * (2 * math.pi / wavelength)[..., None]
    heading, speed = 2 * math.pi * pan[:, 0], slowest + (fastest - slowest) * pan[:, 1]
    velocity = torch.stack([heading.cos(), heading.sin()], -1) * speed[:, None]
    axis = torch.arange(SIZE, dtype=torch.float32)
    travelled = torch.einsum("bwi,bi,f->bwf", vector, velocity, time)
    x, y = vector[..., 0, None] * axis, vector[..., 1, None] * axis
    angle = x[:, :, None, None] + y[:, :, None, :, None] + (phase[..., None] - travelled)[..., None, None]
    height = (angle.sin() * (0.6 + 0.8 * waves[..., 3])[..., None, None, None]).sum(1)
    mix = torch.sigmoid(texture.steepness * height)[:, :, None]
    dark, light = palette[:, None, :, :, None, None].unbind(2)
    return dark + (light - dark) * mix


def _bounce(draws: Tensor, radius: Tensor, time: Tensor) -> Tensor:
    """Positions [B, F, n, 2] at each sprite's ``time`` [F, n]: straight lines, reflected by the frame's borders."""
    span = SIZE - 1 - 2 * radius
    speed = (0.4 + 0.8 * draws[..., 2:]) * torch.where(draws[..., :2] < 0.5, -1.0, 1.0)
    begin = draws[..., :2] * 2 % 1 * span[..., None]
    path = (begin[:, None] + speed[:, None] * time[..., None]) % (2 * span[:, None, :, None])
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
