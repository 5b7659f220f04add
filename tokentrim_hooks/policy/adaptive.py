"""AdaptivePolicy: sees corruption that has settled, and takes motion for motion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import severity_of, unstable_tokens
from tokentrim_hooks.policy.novelty import colours, displaced, nearest
from tokentrim_hooks.policy.options import number, whole
from tokentrim_hooks.policy.statistics import robust
from tokentrim_hooks.policy.views import Chunk, History, Verdict

LEAST = 0.01
"""Share of a token's size, the mean over the scene's first chunk, below which a deviation is rounding or invisible."""


@dataclass(frozen=True)
class AdaptivePolicy(Policy):
    """Prune what is new to the scene, not what has moved. Ours, not the paper's; source: ``docs/policies.md``.

    A token's *novelty* is the larger of two distances: of its colour, the mean of each of its channels, to the most
    similar colour of the scene's first chunk, wherever that lies; and, ``fresh`` times, of all of it to what the
    previous chunk shows up to ``reach`` tokens away. A thing that moves is found again in both; corruption is not, also
    when it has stood for chunks. A chunk is unstable when its mean novelty over the unstable set exceeds the median of
    the severities before by ``sensitivity`` robust deviations, of at least ``floor`` times that median each.

    Args:
        fraction: share of spatial tokens in the unstable set, 0 < p <= 1. sensitivity: deviations above the median.
        floor: smallest deviation, as a share of the median (of a token's size it is a hundredth at least).
        fresh: weight of the previous chunk. reach: how far a thing may move from one chunk to the next, in tokens.
        warmup: with fewer severities seen than this, nothing is pruned.
        max_regenerations, persist, prune_anchors, coarse: see :class:`Policy`.
    """

    fraction: float = 0.06
    sensitivity: float = 1.5
    floor: float = 0.3
    fresh: float = 0.7
    reach: int = 1
    warmup: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        number("fraction", self.fraction, 1e-12, 1.0, "in (0, 1]")
        for name in ("sensitivity", "floor", "fresh"):
            number(name, getattr(self, name), 0.0, math.inf, "a finite number >= 0")
        whole("reach", self.reach)
        whole("warmup", self.warmup)

    @property
    def recalls(self) -> int:
        """Severities that the history is to hold one by one."""
        return 64

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """Flag the samples in which something is new to the scene."""
        score = self.novelty(chunk)
        tokens = unstable_tokens(score, self.fraction)
        severity = severity_of(score, tokens)
        threshold = torch.full_like(severity, math.inf)
        if history.count >= max(self.warmup, 1) and history.recent is not None:
            median, deviation = robust(history.recent)
            least = torch.maximum(self.floor * median, LEAST * chunk.first.norm(dim=-1).mean(dim=1))
            threshold = median + self.sensitivity * torch.maximum(deviation, least)
        return Verdict(tokens, severity, threshold, severity.to(threshold.dtype) > threshold)

    def novelty(self, chunk: Chunk) -> Tensor:
        """How new every token is, ``[B, N]``."""
        channels, *size = chunk.prediction.shape[-3:]
        patch = size[0] // chunk.grid[0], size[1] // chunk.grid[1]
        new = nearest(colours(chunk.summary, channels), colours(chunk.first, channels))
        moved = displaced(chunk.summary, chunk.previous, chunk.grid, patch, self.reach)
        return torch.maximum(new, self.fresh * moved)
