"""Where tokens stand and how pixels become tokens: rotary positions, patches, scales of noisy input."""

from __future__ import annotations

import torch
from torch import Tensor

DATA_STD = 0.5
"""Standard deviation of the scenes' pixels; fixes how the network's output is scaled at each noise level."""


def rotary_table(frames: Tensor, grid: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 3D rotary angles for absolute ``frames`` [F]; each [F*h*w, 1, head_dim/2] float32."""
    pairs = head_dim // 2
    sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    axes = (frames.float(), *(torch.arange(n, device=frames.device).float() for n in grid))
    angles = []
    for axis, (position, size) in enumerate(zip(axes, sizes, strict=True)):
        # Distances here are tens of frames and tokens, not thousands: a base of 100 spends no pair on constants.
        rate = 100.0 ** (-torch.arange(size, device=frames.device) / size)
        shape = [-1 if i == axis else 1 for i in range(3)] + [size]
        angles.append((position[:, None] * rate).view(shape).expand(len(frames), *grid, size))
    flat = torch.cat(angles, dim=-1).reshape(-1, 1, pairs)
    return flat.cos(), flat.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary position ``table`` to ``x`` [B, L, n, d]; keeps dtype."""
    cos, sin = (part.to(x.dtype) for part in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def scales(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input scale, skip and output scale [B, 1, F, 1, 1] that keep the network's input and target at unit variance.

    For a noise level s the network sees ``x_t / std(x_t)`` and predicts only what ``x_t`` does not tell of the flow.
    """
    s = (t.double() / 1000)[:, None, :, None, None]
    variance = (1 - s) ** 2 * DATA_STD**2 + s**2
    skip = (s - (1 - s) * DATA_STD**2) / variance
    gain = DATA_STD / variance.sqrt()
    return variance.rsqrt().to(x.dtype), skip.to(x.dtype), gain.to(x.dtype)


def patchify(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[B, C, F, H, W] to [B, F*h*w, ph*pw*C]."""
    tiles = x.unflatten(4, (-1, patch[1])).unflatten(3, (-1, patch[0]))
    return tiles.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, shape: torch.Size, patch: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`patchify` for a video of ``shape`` [B, C, F, H, W]."""
    _, channels, frames, height, width = shape
    grid = (frames, height // patch[0], width // patch[1])
    tiles = tokens.unflatten(2, (patch[0], patch[1], channels)).unflatten(1, grid)
    return tiles.permute(0, 6, 1, 2, 4, 3, 5).reshape(shape)
