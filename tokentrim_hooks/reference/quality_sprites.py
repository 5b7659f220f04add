"""What a video shows of the scene's sprites: are they alive, as large, of the same shape, and where they should be.

A sprite is where the pixels have its colour; truth and video are segmented alike (:func:`look`), so that the truth's
own error is zero. A sprite counts in the frames in which enough of it can be seen in truth. Where it counts and the
video shows next to nothing of it, it is *absent*, and absence has the worst value of each measure: were absent sprites
left out, losing the difficult ones would look like an improvement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from tokentrim_hooks.reference.scenes import Scene

NEAR = 0.5
"""A pixel has a sprite's colour if it is at most this far from it (root mean square over the channels)."""
VISIBLE = 12.0
"""A sprite counts in the frames in which at least so many pixels of it can be seen (a whole one has 50 or more)."""
SMALLEST, LARGEST = 0.5, 2.0
"""A sprite is alive while so much of its true area has its colour; more than twice means that it flooded the frame."""
ABSENT = 0.25
"""A sprite with less of its true area than this is absent; four times its area is as bad."""
LONGEST = 2.0
"""Shape error of an absent sprite, and the largest one: four times as long for its width as it should be."""
FAR = 16.0
"""Distance in pixels of an absent sprite, and the largest one: about how far off a guess is in a frame of 32."""


@dataclass(frozen=True)
class Look:
    """A video and the truth, segmented.

    Attributes:
        shown, true: pixels that have a sprite's colour, in the video and in truth, bool ``[B, F, n, H, W]``.
        ratio: area in the video over the true area, float32 ``[B, F, n]``.
        counts: which sprites can be seen in truth, bool ``[B, F, n]``.
    """

    shown: Tensor
    true: Tensor
    ratio: Tensor
    counts: Tensor

    @property
    def alive(self) -> Tensor:
        """Sprites of about the right area, bool ``[B, F, n]``."""
        return (self.ratio >= SMALLEST) & (self.ratio <= LARGEST)

    @property
    def absent(self) -> Tensor:
        """Sprites of which next to nothing is there, bool ``[B, F, n]``."""
        return self.ratio < ABSENT

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``[B, F, n]`` over the sprites and frames that count, [B]; NaN where none does."""
        return torch.where(self.counts, values, 0.0).sum((1, 2)) / self.counts.sum((1, 2))


def look(video: Tensor, scene: Scene) -> Look:
    """Segment a video ``[B, F, 3, H, W]`` and the truth of the same frames."""
    shown, true = _segment(video, scene.colors), _segment(scene.video, scene.colors)
    ratio = shown.sum((3, 4)) / true.sum((3, 4)).clamp(min=1)
    return Look(shown, true, ratio, scene.masks.sum((3, 4)) >= VISIBLE)


def sprites_alive(video: Tensor, scene: Scene) -> Tensor:
    """Share of visible sprites that are alive, in 0..1, 1 is right: anywhere, about their area has their colour."""
    seen = look(video, scene)
    return seen.mean(seen.alive.float())


def area_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute binary logarithm of a sprite's area over the true one, in 0..2, 0 is right; absent: 2."""
    seen = look(video, scene)
    return seen.mean(seen.ratio.clamp(ABSENT, 1 / ABSENT).log2().abs())


def shape_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute difference of a sprite's elongation to the true one, in 0..2, 0 is right; absent: 2.

    Elongation is the binary logarithm of long over short axis of the ellipse with the sprite's second moments. It says
    the same as that ellipse's eccentricity, which leaps from 0 to 0.4 when a disc is a tenth longer than wide.
    """
    seen = look(video, scene)
    error = (_elongation(seen.shown) - _elongation(seen.true)).abs().clamp(max=LONGEST)
    return seen.mean(torch.where(seen.absent, LONGEST, error))


def place_error(video: Tensor, scene: Scene) -> Tensor:
    """Distance of a sprite's centroid to the true one in pixels, in 0..16, 0 is right; absent or further: 16.

    The true centroid is that of what can be seen, so that a sprite half hidden by the other is not out of place.
    """
    seen = look(video, scene)
    distance = (_centroid(seen.shown) - _centroid(seen.true)).square().sum(-1).sqrt().clamp(max=FAR)
    return seen.mean(torch.where(seen.absent, FAR, distance))


def speed_error(video: Tensor, scene: Scene) -> Tensor:
    """Difference of the way that sprites go to the true one, as a share of that: 0 is right; standing still: 1.

    The way is that of centroids from frame to frame, so neither flicker nor noise counts as motion. An absent sprite
    goes nowhere; one that jitters goes too far, and then this exceeds 1. NaN where the true ones stand still.
    """
    seen = look(video, scene)
    counts = seen.counts[:, 1:] & seen.counts[:, :-1]
    there = counts & ~seen.absent[:, 1:] & ~seen.absent[:, :-1]
    shown, true = (_centroid(mask).diff(dim=1).square().sum(-1).sqrt() for mask in (seen.shown, seen.true))
    gone, right = (shown * there).sum((1, 2)), (true * counts).sum((1, 2))
    return torch.where(right > 0, (gone / right - 1).abs(), torch.nan)


def living(video: Tensor, scene: Scene) -> Tensor:
    """Pixels of the sprites that are alive, wherever they are, and one pixel around them: bool ``[B, F, H, W]``."""
    seen = look(video, scene)
    shown = (seen.shown & seen.alive[..., None, None]).any(2).float()
    return max_pool2d(shown, 3, stride=1, padding=1) > 0


def _segment(video: Tensor, colors: Tensor) -> Tensor:
    """Pixels near the colour of each sprite, bool ``[B, F, n, H, W]``; colours [B, n, 3].

    The video is clipped to [-1, 1] first, as a screen does: a sprite that only burns is still there.
    """
    difference = video.clamp(-1, 1)[:, :, None] - colors[:, None, :, :, None, None]
    return difference.square().mean(3).sqrt() <= NEAR


def _centroid(mask: Tensor) -> Tensor:
    """Mean (x, y) of the pixels of a mask ``[B, F, n, H, W]``, [B, F, n, 2]; (0, 0) of none."""
    axis = torch.arange(mask.shape[-1], dtype=torch.float32, device=mask.device)
    columns, rows = mask.sum(3).float(), mask.sum(4).float()
    return torch.stack([columns @ axis, rows @ axis], dim=-1) / mask.sum((3, 4)).clamp(min=1)[..., None]


def _elongation(mask: Tensor) -> Tensor:
    """Binary logarithm of long over short axis [B, F, n] of a mask ``[B, F, n, H, W]``; 0 of none."""
    axis = torch.arange(mask.shape[-1], dtype=torch.float32, device=mask.device)
    dx, dy = (axis - _centroid(mask)[..., None]).unbind(-2)
    weights, area = mask.float(), mask.sum((3, 4)).clamp(min=1)
    # 1 / 12 is a pixel's own second moment: a single one is as long as wide.
    xx, yy = ((weights.sum(dim) * d.square()).sum(-1) / area + 1 / 12 for dim, d in ((3, dx), (4, dy)))
    xy = torch.einsum("bfnyx,bfny,bfnx->bfn", weights, dy, dx) / area
    middle, spread = (xx + yy) / 2, (((xx - yy) / 2).square() + xy.square()).sqrt()
    return ((middle + spread) / (middle - spread).clamp(min=1 / 12)).log2() / 2
