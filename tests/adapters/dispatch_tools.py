"""What tests of diffusers adapters share: a watched kernel, and an independent way to hide keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokentrim_hooks.testing import ForcedPolicy

Hide = Callable[[int], "Tensor | None"]
"""Given the number of keys, the dead ones ``[keys]`` or ``[B, keys]``; None for attention that is none of ours."""


@dataclass(frozen=True, kw_only=True)
class AllPolicy(ForcedPolicy):
    """Forced, and a coarse key dies only with all its tokens."""

    coarse: str = "all"


@dataclass
class Kernel:
    """Lengths of (queries, keys) that reached ``scaled_dot_product_attention``, call by call."""

    lengths: list[tuple[int, int]] = field(default_factory=list)

    def keys(self, queries: int) -> list[int]:
        """Numbers of keys in the calls with so many queries, repetitions removed."""
        found = [k for q, k in self.lengths if q == queries]
        return [k for i, k in enumerate(found) if i == 0 or found[i - 1] != k]


@contextmanager
def watched(hide: Hide | None = None) -> Iterator[Kernel]:
    """Log kernel calls; with ``hide``, put -inf at the dead keys: an independent reference for pruning."""
    original, kernel = F.scaled_dot_product_attention, Kernel()

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        kernel.lengths.append((query.shape[2], key.shape[2]))
        dead = hide(key.shape[2]) if hide is not None else None
        if dead is not None:
            assert dead.shape[-1] == key.shape[2]
            bias = torch.zeros(dead.reshape(-1, dead.shape[-1]).shape).masked_fill(dead, -torch.inf)[:, None, None]
            if attn_mask is not None:
                bias = bias.masked_fill(~attn_mask, -torch.inf)
            attn_mask = bias
        return original(query=query, key=key, value=value, attn_mask=attn_mask, **options)

    F.scaled_dot_product_attention = attention
    try:
        yield kernel
    finally:
        F.scaled_dot_product_attention = original


def poison(latents: Tensor, tokens: Sequence[int], frames: Sequence[int], side: int = 2) -> Tensor:
    """Garbage in the pixels of ``tokens``, ``side`` wide each, in some frames of ``[B, C, F, H, W]``."""
    bad, across = latents.clone(), latents.shape[-1] // side
    for token in tokens:
        row, column = side * (token // across), side * (token % across)
        for frame in frames:
            bad[:, :, frame, row : row + side, column : column + side] += 50.0
    return bad


def dead_keys(
    groups: Sequence[tuple[Sequence[int], int]], grid: tuple[int, int], dead: Callable[[int], set[int]], rule: str
) -> list[bool]:
    """Dead keys of history parts, found by position: ``groups`` are (frames, scale), ``dead(frame)`` its dead tokens.

    Frames outside ``dead``'s knowledge are given as None and do not count.
    """
    keys = []
    for frames, scale in groups:
        for first in range(0, len(frames), scale):
            covered = [frame for frame in frames[first : first + scale] if frame is not None]
            for row in range(0, grid[0], scale):
                for column in range(0, grid[1], scale):
                    tokens = [
                        r * grid[1] + c
                        for r in range(row, min(row + scale, grid[0]))
                        for c in range(column, min(column + scale, grid[1]))
                    ]
                    hits = [token in dead(frame) for frame in covered for token in tokens]
                    keys.append(bool(hits) and (any(hits) if rule == "any" else all(hits)))
    return keys
