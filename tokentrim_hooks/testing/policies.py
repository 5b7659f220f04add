"""Policies for tests: prune what the test says, where the test says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import severity_of, unstable_tokens
from tokentrim_hooks.policy.token_trim import ObservePolicy
from tokentrim_hooks.policy.views import Chunk, History, Verdict

Tokens = float | Sequence[int] | Sequence[Sequence[int]]
"""A fraction of the tokens (the most drifting ones), the same tokens for all samples, or one list per sample."""


@dataclass(frozen=True)
class ForcedPolicy(Policy):
    """Prunes given tokens at given chunks whatever the drift is; every other chunk is accepted.

    Attributes:
        at: what to prune at which chunk (0 is the first, which no policy ever judges): a fraction, a list of tokens,
            or one list of tokens for each sample (an empty one spares the sample).
        samples: samples that are pruned; None means all.
        max_regenerations, persist, prune_anchors, coarse: as in :class:`tokentrim_hooks.Policy`.
    """

    at: Mapping[int, Tokens] = field(default_factory=dict)
    samples: tuple[int, ...] | None = None

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """Give the planned verdict for this chunk; severity is the mean drift over the chosen tokens."""
        drift = chunk.drift
        tokens, wanted = _chosen(self.at.get(chunk.index), drift)
        if self.samples is not None:
            wanted = [want and sample in self.samples for sample, want in enumerate(wanted)]
        severity = severity_of(drift, tokens)
        prune = torch.tensor(wanted, device=drift.device)
        # A threshold that agrees with the verdict, so that records and pictures read as for any other policy.
        threshold = torch.where(prune, torch.zeros_like(severity), torch.full_like(severity, math.inf))
        return Verdict(tokens, severity, threshold, prune)


@dataclass(frozen=True, kw_only=True)
class CountingPolicy(ObservePolicy):
    """Observes; ``known`` collects how many severities are known at each chunk that is judged."""

    known: list[int]

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """Note the count, measure."""
        self.known.append(history.count)
        return super().judge(chunk, history)


def _chosen(plan: Tokens | None, drift: Tensor) -> tuple[Tensor, list[bool]]:
    """Token indices ``[B, k]`` and, per sample, whether it is to be pruned."""
    batch = drift.shape[0]
    if plan is None:
        return unstable_tokens(drift, 1 / drift.shape[1]), [False] * batch
    if isinstance(plan, (int, float)):
        return unstable_tokens(drift, float(plan)), [True] * batch
    lists = [_tokens_of(plan, sample) for sample in range(batch)]
    width = max(map(len, lists), default=0)
    # Short lists repeat their last token: naming a token twice prunes it once.
    padded = [(chosen or [0]) + [(chosen or [0])[-1]] * (max(width, 1) - max(len(chosen), 1)) for chosen in lists]
    return torch.tensor(padded, device=drift.device), [bool(chosen) for chosen in lists]


def _tokens_of(plan: Sequence[int] | Sequence[Sequence[int]], sample: int) -> list[int]:
    if plan and not isinstance(plan[0], int):
        own: Sequence[int] = plan[sample]  # type: ignore[assignment]
        return [int(token) for token in own]
    return [int(token) for token in plan]  # type: ignore[arg-type]
