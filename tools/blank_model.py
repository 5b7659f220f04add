"""A model that computes nothing, called as Self-Forcing's is: what is left of a video's time is the sampler's and ours.

Its layers keep a cache as Self-Forcing's do, where it is given queries to attend with; else they are there to be found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FRAMES, STEPS = 3, (1000, 750, 500, 250, 0)
"""Frames of a chunk, and timesteps of its denoiser calls; the last one commits."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Takes no time: what is measured is what happens to ``k`` and ``v`` on their way here."""
    return q


class BlankAttention(nn.Module):
    """Counts rows as Self-Forcing's layers do. Where nothing ``rolls`` the rows stay where they are, marks too."""

    sink_size, local_attn_size = 0, -1

    def __init__(self, rolls: bool) -> None:
        super().__init__()
        self.rolls = rolls

    def forward(self, q: Tensor, cache: dict[str, Any], start: int) -> Tensor:
        """``q`` is ``[B, L, heads, width]``, the chunk that begins at row ``start`` of the video."""
        end, new = start + q.shape[1], q.shape[1]
        if end > cache["global_end_index"]:
            cache["global_end_index"] = end
            for rows in (cache["k"], cache["v"]) if self.rolls else ():
                rows[:, :-new] = rows[:, new:].clone()
                rows[:, -new:] = 1
        return attention(q, cache["k"], cache["v"])


class _Block(nn.Module):
    def __init__(self, rolls: bool) -> None:
        super().__init__()
        self.self_attn = BlankAttention(rolls)


class Blank(nn.Module):
    """A generator wrapper that answers with tensors made beforehand.

    Args:
        height, width: of the latents, which have 16 channels; a token is 2 x 2 of their pixels. batch: of videos.
        layers: of the model. query: ``[B, L, heads, width]``, what each layer attends with; None: no layer is called.
        rolls: whether the cache is full, so that rows move with each chunk.
    """

    def __init__(
        self, height: int, width: int, batch: int = 1, layers: int = 1, query: Tensor | None = None, rolls: bool = False
    ) -> None:
        super().__init__()
        self.tokens = height * width // 4
        self.model: Any = nn.Module()
        self.model.blocks = nn.ModuleList(_Block(rolls) for _ in range(layers))
        self.model.patch_size = (1, 2, 2)
        self.query = query
        self.answers = torch.randn(3, batch, FRAMES, 16, height, width)

    def forward(
        self,
        noisy_image_or_video: Tensor,
        conditional_dict: Any,
        timestep: Tensor,
        kv_cache: Any = None,
        crossattn_cache: Any = None,
        current_start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(flow, x0)."""
        if self.query is not None:
            for block, cache in zip(self.model.blocks, kv_cache, strict=True):
                block.self_attn(self.query, cache, current_start)
        answer = self.answers[current_start // (FRAMES * self.tokens) % 3]
        return answer, answer
