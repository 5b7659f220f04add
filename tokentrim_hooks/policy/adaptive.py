"""AdaptivePolicy: sees corruption that has settled, and takes motion for motion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import severity_of, unstable_tokens
from tokentrim_hooks.policy.options import number, whole
from tokentrim_hooks.policy.views import Chunk, History, Verdict

BLOCK = 1024
"""Tokens that are compared with all others at once."""
SPREAD = 1.4826
"""Standard deviations in a median absolute deviation, for a normal distribution."""


@dataclass(frozen=True)
class AdaptivePolicy(Policy):
    """Prune what is new to the scene, not what has moved.

    A token's *novelty* is its distance to the most similar token of the scene's first chunk, wherever that one lies, or
    ``fresh`` times its distance to the most similar one of the previous chunk within ``reach`` tokens, whichever is
    larger. A thing that moves is found again in both; corruption is not, also when it has stood for chunks and its
    predecessor shows it, too. A chunk is unstable when its mean novelty over the unstable set exceeds the median of
    the severities before by ``sensitivity`` robust deviations, of at least ``floor`` times that median each.

    Not the paper's: found on scenes of the reference model that no table reports (``docs/policies.md``).

    Args:
        fraction: share of spatial tokens in the unstable set, 0 < p <= 1.
        sensitivity: deviations above the median.
        floor: smallest deviation, as a share of the median.
        fresh: weight of the previous chunk. reach: how far a thing may move from one chunk to the next, in tokens.
        warmup: with fewer severities seen than this, nothing is pruned.
        max_regenerations, persist, prune_anchors, coarse: see :class:`Policy`.
    """

    fraction: float = 0.06
    sensitivity: float = 2.0
    floor: float = 0.125
    fresh: float = 0.8
    reach: int = 1
    warmup: int = 2

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
        score = torch.maximum(nearest(chunk.summary, chunk.first), self.fresh * self._fresh(chunk))
        tokens = unstable_tokens(score, self.fraction)
        severity = severity_of(score, tokens)
        if history.count < max(self.warmup, 1) or history.recent is None:
            never = torch.zeros_like(severity, dtype=torch.bool)
            return Verdict(tokens, severity, torch.full_like(severity, math.inf), never)
        median = history.recent.median(dim=1, keepdim=True).values
        deviation = SPREAD * (history.recent - median).abs().median(dim=1, keepdim=True).values
        threshold = (median + self.sensitivity * torch.maximum(deviation, self.floor * median)).squeeze(1)
        return Verdict(tokens, severity, threshold, severity.to(threshold.dtype) > threshold)

    def _fresh(self, chunk: Chunk) -> Tensor:
        """Distance of every token to the most similar one of the previous chunk within reach, ``[B, N]``."""
        size = chunk.grid
        reach = min(self.reach, max(size) - 1)  # nothing lies farther away, and each step would pad the grid
        now, before = (t.transpose(1, 2).reshape(len(t), -1, *size) for t in (chunk.summary, chunk.previous))
        padded = torch.nn.functional.pad(before, (reach,) * 4, value=math.inf)
        shifts = [(y, x) for y in range(2 * reach + 1) for x in range(2 * reach + 1)]
        found = [(now - padded[..., y : y + size[0], x : x + size[1]]).norm(dim=1) for y, x in shifts]
        return torch.stack(found).amin(0).flatten(1)


def nearest(tokens: Tensor, others: Tensor) -> Tensor:
    """Distance of every token to the most similar of ``others``: ``[B, N, D], [B, M, D] -> [B, N]``."""
    return torch.cat([torch.cdist(part, others).amin(-1) for part in torch.split(tokens, BLOCK, 1)], dim=1)
