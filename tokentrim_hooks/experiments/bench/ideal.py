"""The floor: what judging a chunk needs at the least, written by hand for one model and one video, without a policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.experiments.bench.target import Target
from tokentrim_hooks.policy.drift import Summary

SHARE = 0.1
"""Of the tokens, in the unstable set: the paper's p."""


class Ideal:
    """One summary, one norm, one top-k and one read per chunk, at its first denoiser call. No records, no checks.

    With the kernels that judging uses, for else a loop with slower ones would be no floor: what is over it is ours.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.calls = target, 0
        self.previous: Summary | None = None
        self.severities: list[Tensor] = []

    def __call__(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        """A forward hook: judges the first call of a chunk, keeps the last one's answer for the next."""
        place, self.calls = self.calls % self.target.calls, self.calls + 1
        latents = output[-1] if isinstance(output, tuple) else output
        latents = latents if self.target.frames_dim == 1 else latents.movedim(self.target.frames_dim, 1)
        if place == 0:
            self._judge(self._summary(latents))
        elif place == self.target.calls - 2:  # the last but the commit is what was accepted
            self.previous = self._summary(latents)

    def _judge(self, summary: Summary) -> None:
        if self.previous is not None:
            drift = summary.drift(self.previous)
            worst = drift.topk(max(1, int(SHARE * drift.shape[1])), dim=1)
            read = torch.cat([worst.values.mean(dim=1, keepdim=True), worst.indices.to(drift.dtype)], dim=1).cpu()
            self.severities.append(read[:, 0])

    def _summary(self, latents: Tensor) -> Summary:
        return Summary.of(latents, (self.target.patch, self.target.patch))


@contextmanager
def ideal(target: Target) -> Iterator[Ideal]:
    """Watch a target's denoiser for the length of the block."""
    assert target.denoiser is not None, "asked for where there is one"
    watcher = Ideal(target)
    handle = target.denoiser.register_forward_hook(watcher)
    try:
        yield watcher
    finally:
        handle.remove()
