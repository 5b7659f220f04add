"""What one host read brings back: the verdict, and all that was waiting on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import History, Verdict


@dataclass(frozen=True)
class Reading:
    """One verdict and all that was waiting on the device, read by the host in one go."""

    severity: list[float]
    threshold: list[float]
    mean: list[float]
    std: list[float]
    prune: list[bool]
    tokens: list[list[int]]
    drift: list[list[float]]
    flags: list[bool]
    count: int


def read(verdict: Verdict, drift: Tensor, history: History, flags: list[Tensor]) -> Reading:
    """Bring a verdict, its drift ``[B, N]`` and waiting flags to the host: exactly one synchronisation."""
    severity = verdict.severity
    wide = torch.float32 if severity.device.type == "mps" else torch.float64
    columns = [severity, verdict.threshold, history.mean, history.std, verdict.prune]
    table = torch.stack([column.to(severity.device, wide) for column in columns])
    waiting = [flag.reshape(1).to(severity.device, wide) for flag in flags]
    parts = [table, verdict.tokens.to(wide), drift.to(wide), *waiting]
    values: list[float] = torch.cat([part.flatten() for part in parts]).tolist()
    batch = severity.shape[0]
    rows = [_take(values, batch) for _ in range(5)]
    tokens = [[int(token) for token in _take(values, verdict.tokens.shape[1])] for _ in range(batch)]
    drifts = [_take(values, drift.shape[1]) for _ in range(batch)]
    prune = [bool(value) for value in rows[4]]
    flags_read = [bool(value) for value in values]
    return Reading(rows[0], rows[1], rows[2], rows[3], prune, tokens, drifts, flags_read, history.count)


def _take(values: list[float], count: int) -> list[float]:
    """Remove and return the first ``count`` values."""
    taken = values[:count]
    del values[:count]
    return taken
