"""Policies that decide by plan instead of by drift, so that tests know what must have been pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokentrim_hooks import Chunk, History, Policy, Verdict

Plan = dict[int, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class ForcedPolicy(Policy):
    """Prunes ``plan[chunk]`` (one token list per sample, empty = spare it) at the chunk of that number."""

    plan: Plan

    def replan(self, plan: Plan) -> None:
        """Go on with another plan, in the middle of a patch: the policy is frozen, its plan is not."""
        self.plan.clear()
        self.plan.update(plan)

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """Return the plan's tokens; samples that are spared carry token numbers that nobody may use."""
        batch = chunk.drift.shape[0]
        wanted = self.plan.get(chunk.index, [[] for _ in range(batch)])
        width = max([1, *map(len, wanted)])
        tokens = torch.tensor([list(some) or [0] * width for some in wanted])
        flagged = torch.tensor([bool(some) for some in wanted])
        severity = chunk.drift.mean(1)
        return Verdict(tokens, severity, torch.full_like(severity, torch.inf), flagged)
