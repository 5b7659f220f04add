"""What one host read brings back: a verdict, and all that was waiting on the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.errors import PolicyError
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.views import History, Verdict

MANY = 512
"""Tokens in an unstable set."""


@dataclass(frozen=True)
class Reading:
    """A verdict on the host.

    Attributes:
        severity, threshold, mean, std: of the verdict and of the history that it was made with, per sample.
        count: severities in that history.
        prune: per sample. tokens: the unstable set, per sample.
        drift: of every token, ``[B, N]`` float64 on the CPU.
        clean: whether the judged call's own latents were clean; False where nobody asked the device.
        waiting: the same of the calls whose flags waited for this read.
        watched: severity of a policy that only watches, per sample; None where none does.
    """

    severity: list[float]
    threshold: list[float]
    mean: list[float]
    std: list[float]
    count: int
    prune: list[bool]
    tokens: list[list[int]]
    drift: Tensor
    clean: bool
    waiting: list[bool]
    watched: list[float] | None = None


def checked(answer: object, policy: Policy, drift: Tensor) -> Verdict:
    """An answer of :meth:`Policy.judge` whose kinds and shapes are a verdict's on ``drift`` ``[B, N]``; no host read.

    A mask ``[B, N]`` in the place of token indices would prune tokens 0 and 1, so dtypes count.

    Raises:
        PolicyError: they are not.
    """
    if not isinstance(answer, Verdict):
        raise PolicyError(f"{type(policy).__name__}.judge returned {type(answer).__name__}; return a Verdict, or None")
    batch = drift.shape[:1]
    for name, (kind, fits) in _WANTED.items():
        value = getattr(answer, name)
        if name == "watched" and value is None:
            continue
        if not (isinstance(value, Tensor) and fits(value, batch)):
            own = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PolicyError(
                f"{type(policy).__name__}.judge returned {own} as Verdict.{name}; give {kind.format(*batch)}"
            )
    return answer


_Fits = Callable[[Tensor, tuple[int, ...]], bool]
_WANTED: dict[str, tuple[str, _Fits]] = {
    "tokens": ("a LongTensor [{}, k]", lambda t, batch: t.dtype == torch.long and t.shape[:-1] == batch),
    "severity": ("a floating tensor [{}]", lambda t, batch: t.is_floating_point() and t.shape == batch),
    "threshold": ("a floating tensor [{}]", lambda t, batch: t.is_floating_point() and t.shape == batch),
    "prune": ("a BoolTensor [{}]", lambda t, batch: t.dtype == torch.bool and t.shape == batch),
    "watched": ("a floating tensor [{}]", lambda t, batch: t.is_floating_point() and t.shape == batch),
}
"""By field of a verdict what it has to be, in words and as a test."""


def check_values(reading: Reading, policy: Policy) -> None:
    """Look at what a host read brought.

    Raises:
        PolicyError: a token that the grid does not have, or a severity or threshold that would spoil the statistics.
    """
    size = reading.drift.shape[-1]
    name = f"{type(policy).__name__}.judge returned"
    if any(tokens and not 0 <= min(tokens) <= max(tokens) < size for tokens in reading.tokens):
        raise PolicyError(f"{name} tokens outside of the patch grid; give indices from 0 to {size - 1}")
    if not all(map(math.isfinite, reading.severity)) or any(map(math.isnan, reading.threshold)):
        raise PolicyError(f"{name} a severity that is not finite, or NaN as threshold; answer None for no opinion")


def read(
    verdict: Verdict, drift: Tensor, history: History, noisy: Tensor | None = None, waiting: list[Tensor] | None = None
) -> Reading:
    """Bring a verdict, its drift ``[B, N]`` and flags to the host: exactly one synchronisation.

    Each transfer would be one of its own, so all travel as one, in float64 (float32 on a device that has no wider
    type). Token indices and flags survive that: whole numbers are exact in float32 up to 2^24.
    """
    flags = [*(waiting or []), *([] if noisy is None else [noisy])]
    beside = () if verdict.watched is None else (verdict.watched,)
    own = (verdict.severity, verdict.threshold, history.mean, history.std, verdict.prune, *beside)
    parts = [*own, *(flag.reshape(1) for flag in flags), verdict.tokens.flatten(), drift.flatten()]
    host = _to_host(parts, drift)
    # Out of torch at once: for so few numbers each operation of it takes longer than all of Python's.
    few = iter(host[: -drift.numel()].tolist())
    batch, each = drift.shape[0], verdict.tokens.shape[-1]
    severity, threshold, mean, std, prune, *watched = (list(itertools.islice(few, batch)) for _ in own)
    clean = [not flag for flag in itertools.islice(few, len(flags))]
    # Of many tokens torch makes whole numbers in a third of Python's time.
    many = batch * each > MANY
    tokens = host[-drift.numel() - batch * each : -drift.numel()].long().tolist() if many else list(map(int, few))
    rows = [tokens[sample * each : (sample + 1) * each] for sample in range(batch)]
    return Reading(
        severity=severity,
        threshold=threshold,
        mean=mean,
        std=std,
        count=history.count,
        prune=list(map(bool, prune)),
        # One that is named twice, to fill a row, is one.
        tokens=[row if len(row) == len({*row}) else list(dict.fromkeys(row)) for row in rows],
        drift=host[-drift.numel() :].view(drift.shape),
        clean=noisy is not None and clean.pop(),
        waiting=clean,
        watched=watched[0] if watched else None,
    )


def _to_host(parts: Sequence[Tensor], drift: Tensor) -> Tensor:
    """All of one-dimensional ``parts`` behind each other on the CPU, by way of the device of ``drift``."""
    wide = torch.float32 if drift.device.type == "mps" else torch.float64
    parts = [part if part.device == drift.device else part.to(drift.device) for part in parts]
    if all(part.dtype != wide for part in parts):
        parts[0] = parts[0].to(wide)  # one of them is enough: concatenation promotes the others, in one go
    return torch.cat(parts).cpu()


def merged(old: list[list[int]], new: list[list[int]]) -> list[list[int]]:
    """Per-sample union of token lists."""
    return [sorted({*a, *b}) for a, b in zip(old, new, strict=True)] if old else [list(b) for b in new]
