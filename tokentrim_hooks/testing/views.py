"""What a policy is shown, made from a drift alone: to try a policy without any model."""

from __future__ import annotations

import torch
from torch import Tensor

from tokentrim_hooks.policy.views import Chunk


def chunk_of(drift: Tensor, index: int = 1, frames: int = 3) -> Chunk:
    """A chunk whose tokens have drifted by ``drift`` ``[B, N]`` from a previous chunk that was all zero.

    Args:
        drift: of every token; not negative.
        index: ordinal of the chunk.
        frames: latent frames per chunk.

    Example:
        >>> DriftPolicy().judge(chunk_of(torch.rand(2, 64)), history)  # doctest: +SKIP
    """
    summary = drift[..., None]
    return Chunk(
        phase="first",
        index=index,
        start=index * frames,
        frames=frames,
        grid=(1, drift.shape[1]),
        prediction=drift[:, None, None, None].expand(-1, frames, 1, 1, -1),
        summary=summary,
        previous=torch.zeros_like(summary),
        first=torch.zeros_like(summary),
        drift=drift,
    )
