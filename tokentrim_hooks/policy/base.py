"""What a policy is asked and what it answers. A policy sees tensors, never a model, and never synchronises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class History:
    """What was accepted before the chunk in question.

    ``chunk`` counts the accepted chunks of this video (0 = this is the first), ``count`` the severities among them;
    ``mean`` and ``std`` (population) of these severities are ``[B]``, on the model's device.
    """

    chunk: int
    count: int
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Verdict:
    """A policy's answer, per sample.

    ``tokens`` is LongTensor ``[B, k]``, row-major over the patch grid; ``severity`` and ``threshold`` are ``[B]`` in
    the latents' units; ``prune`` is BoolTensor ``[B]``.
    """

    tokens: Tensor
    severity: Tensor
    threshold: Tensor
    prune: Tensor


@runtime_checkable
class Policy(Protocol):
    """Anything with ``judge``. Optional attributes, read with these defaults, are explained at :class:`DriftPolicy`:

    ``max_regenerations = 1``, ``persist = True``, ``prune_anchors = False``, ``coarse = "any"``. Optional method:
    ``redraw(latents, start)`` gives the noise that a chunk is regenerated from, instead of the same noise again.
    A verdict that prunes with no token (``k = 0``) regenerates on the context as it is.
    """

    def judge(self, drift: Tensor, history: History) -> Verdict:
        """Judge a chunk by its token drift ``[B, N]`` (float32 or wider, on the model's device)."""
        ...
