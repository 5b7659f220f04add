"""What is new in a chunk, and what has only moved: pure tensor functions (shapes as in ``policy.drift``)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

BLOCK = 1024
"""Tokens that are compared with all others at once."""


def colours(summary: Tensor, channels: int) -> Tensor:
    """Every token's mean of each channel, scaled so that a token of one colour lies where it lay: ``[B, N, C]``.

    Args:
        summary: latent summary ``[B, N, D]``, with ``D = pixels of a token * channels``.
        channels: C.
    """
    pixels = summary.reshape(*summary.shape[:-1], -1, channels)
    return pixels.mean(dim=-2) * math.sqrt(pixels.shape[-2])


def nearest(tokens: Tensor, others: Tensor) -> Tensor:
    """Distance of every token to the most similar of ``others``: ``[B, N, D], [B, M, D] -> [B, N]``."""
    return torch.cat([torch.cdist(part, others).amin(-1) for part in torch.split(tokens, BLOCK, 1)], dim=1)


def displaced(summary: Tensor, before: Tensor, grid: tuple[int, int], patch: tuple[int, int], reach: int) -> Tensor:
    """Distance of every token to what ``before`` shows nearby, where that is most similar: ``[B, N]``.

    Nearby is up to ``reach`` tokens away in height and in width, in steps of half a token (at least one pixel): a thing
    does not move by whole tokens. Beyond the edge the outermost pixels go on.

    Args:
        summary, before: latent summaries ``[B, N, D]``. grid: their (height, width) in tokens.
        patch: (height, width) of a token in pixels.
    """
    now, then = (_picture(tokens, grid, patch) for tokens in (summary, before))
    (height, width), far = now.shape[-2:], min(reach, max(grid) - 1)  # nothing lies farther away
    rows, columns = (_steps(far, side) for side in patch)
    padded = pad(then, (-columns[0], -columns[0], -rows[0], -rows[0]), mode="replicate")
    best = torch.full_like(summary[..., 0], torch.inf)
    for y in rows:
        for x in columns:
            top, left = y - rows[0], x - columns[0]
            off = (now - padded[..., top : top + height, left : left + width]).square().sum(dim=1, keepdim=True)
            best = torch.minimum(best, avg_pool2d(off, patch).flatten(1))
    return (best * (patch[0] * patch[1])).sqrt()


def _picture(summary: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The mean picture that a summary was made of, ``[B, C, H, W]``."""
    (h, w), (p, q) = grid, patch
    laid_out: Tensor = rearrange(summary, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)
    return laid_out


def _steps(reach: int, side: int) -> list[int]:
    """Pixels to move by, in steps of half a token, both ways."""
    step = max(side // 2, 1)
    most = reach * side // step
    return [step * i for i in range(-most, most + 1)]
