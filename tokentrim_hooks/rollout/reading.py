"""What one host read brings back: a verdict, and all that was waiting on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.errors import PolicyError
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.views import History, Verdict


@dataclass(frozen=True)
class Reading:
    """A verdict on the host; all tensors are on the CPU, the first four in float64 ``[B]``.

    Attributes:
        severity, threshold, mean, std: of the verdict and of the history that it was made with.
        count: severities in that history.
        prune: per sample. tokens: the unstable set, per sample.
        drift: of every token, ``[B, N]`` float64.
        clean: whether the judged call's own latents were clean; False where nobody asked the device.
        waiting: the flags that waited for this read.
    """

    severity: Tensor
    threshold: Tensor
    mean: Tensor
    std: Tensor
    count: int
    prune: list[bool]
    tokens: list[list[int]]
    drift: Tensor
    clean: bool
    waiting: list[bool]


def checked(answer: object, policy: Policy, drift: Tensor) -> Verdict:
    """An answer of :meth:`Policy.judge` whose kinds and shapes are a verdict's on ``drift`` ``[B, N]``; no host read.

    A mask ``[B, N]`` in the place of token indices would prune tokens 0 and 1, so dtypes count.

    Raises:
        PolicyError: they are not.
    """
    if not isinstance(answer, Verdict):
        raise PolicyError(f"{type(policy).__name__}.judge returned {type(answer).__name__}; return a Verdict, or None")
    batch = (len(drift),)
    wanted: dict[str, tuple[str, Callable[[Tensor], bool]]] = {
        "tokens": (f"a LongTensor [{len(drift)}, k]", lambda t: t.dtype == torch.long and t.shape[:-1] == batch),
        "severity": (f"a floating tensor [{len(drift)}]", lambda t: t.is_floating_point() and t.shape == batch),
        "threshold": (f"a floating tensor [{len(drift)}]", lambda t: t.is_floating_point() and t.shape == batch),
        "prune": (f"a BoolTensor [{len(drift)}]", lambda t: t.dtype == torch.bool and t.shape == batch),
    }
    for name, (kind, fits) in wanted.items():
        value = getattr(answer, name)
        if not (isinstance(value, Tensor) and fits(value)):
            own = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PolicyError(f"{type(policy).__name__}.judge returned {own} as Verdict.{name}; give {kind}")
    return answer


def check_values(reading: Reading, policy: Policy) -> None:
    """Look at what a host read brought.

    Raises:
        PolicyError: a token that the grid does not have, or a severity or threshold that would spoil the statistics.
    """
    size = reading.drift.shape[-1]
    name = f"{type(policy).__name__}.judge returned"
    if any(tokens and not 0 <= min(tokens) <= max(tokens) < size for tokens in reading.tokens):
        raise PolicyError(f"{name} tokens outside of the patch grid; give indices from 0 to {size - 1}")
    # As Python's floats: a handful of numbers that lie on the host, for which torch would need six operations.
    if not all(map(math.isfinite, reading.severity.tolist())) or any(map(math.isnan, reading.threshold.tolist())):
        raise PolicyError(f"{name} a severity that is not finite, or NaN as threshold; answer None for no opinion")


def read(
    verdict: Verdict, drift: Tensor, history: History, clean: Tensor | None = None, waiting: list[Tensor] | None = None
) -> Reading:
    """Bring a verdict, its drift ``[B, N]`` and flags to the host: exactly one synchronisation."""
    flags = [*(waiting or []), *([] if clean is None else [clean])]
    host = _to_host(
        {
            "severity": verdict.severity,
            "threshold": verdict.threshold,
            "mean": history.mean,
            "std": history.std,
            "prune": verdict.prune,
            "tokens": verdict.tokens,
            "drift": drift,
            **{f"flag {place}": flag for place, flag in enumerate(flags)},
        }
    )
    read_flags = [bool(host[f"flag {place}"]) for place in range(len(flags))]
    return Reading(
        severity=host["severity"],
        threshold=host["threshold"],
        mean=host["mean"],
        std=host["std"],
        count=history.count,
        prune=host["prune"].bool().tolist(),
        tokens=[list(dict.fromkeys(row)) for row in host["tokens"].long().tolist()],  # twice is once: a row is filled
        drift=host["drift"],
        clean=clean is not None and read_flags.pop(),
        waiting=read_flags,
    )


def _to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors on the CPU in one transfer, in float64 (float32 on a device that has no wider type).

    Each transfer would be a synchronisation of its own, so they travel as one. Token indices and flags survive that:
    whole numbers are exact in float32 up to 2^24.
    """
    target = tensors["drift"].device
    wide = torch.float32 if target.type == "mps" else torch.float64
    # One of them in the wide type is enough: concatenation promotes the others, in one go.
    parts = [tensor.to(target).flatten() for tensor in tensors.values()]
    parts[0] = parts[0].to(wide)
    pieces = torch.split(torch.cat(parts).cpu(), [part.numel() for part in parts])
    return {name: piece.view(tensors[name].shape) for name, piece in zip(tensors, pieces, strict=True)}


def merged(old: list[list[int]], new: list[list[int]]) -> list[list[int]]:
    """Per-sample union of token lists."""
    return [sorted({*a, *b}) for a, b in zip(old, new, strict=True)] if old else [list(b) for b in new]
