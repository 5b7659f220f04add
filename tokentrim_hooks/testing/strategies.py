"""Hypothesis strategies for latents, drift, policies, dead tokens and key layouts.

Tensors are drawn as (shape, dtype, seed): large ones cost nothing to generate, a failing example prints as one line.
Importing this module puts torch's random state under hypothesis' control, so that examples can be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import register_random
from hypothesis import strategies as st
from torch import Tensor

from tokentrim_hooks.policy.token_trim import DriftPolicy
from tokentrim_hooks.pruning.context import KeyLayout, Role, Segment

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _TorchRandom:
    """Torch's generator as hypothesis wants to see one."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


_random = _TorchRandom()
register_random(_random)


@dataclass(frozen=True)
class Latents:
    """Recipe of a chunk's latents ``[B, F, C, H, W]``: standard normal numbers from a seed."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    seed: int

    def make(self) -> Tensor:
        """The tensor; the same every time."""
        return normal(self.shape, self.seed).to(self.dtype)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers in float64, from their own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeds() -> st.SearchStrategy[int]:
    """Seeds for tensors of one's own."""
    return st.integers(0, 2**31 - 1)


@st.composite
def latents(draw: Any, dtypes: tuple[torch.dtype, ...] = FLOATS, patch_size: tuple[int, int] = (2, 2)) -> Latents:
    """Small chunks whose frame is a whole number of patches."""
    batch, frames, channels = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 5)) * patch_size[0], draw(st.integers(1, 5)) * patch_size[1]
    return Latents((batch, frames, channels, height, width), draw(st.sampled_from(dtypes)), draw(seeds()))


@dataclass(frozen=True)
class Spiked:
    """Drift ``[B, N]`` float32 in which ``spikes[b]`` are by far the largest of each sample, in no particular order."""

    drift: Tensor
    spikes: tuple[tuple[int, ...], ...]


@st.composite
def spiked_drifts(draw: Any, max_tokens: int = 60) -> Spiked:
    """Drift tensors with the same number of planted spikes in every sample."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(2, max_tokens))
    count = draw(st.integers(1, tokens - 1))
    drift = normal((batch, tokens), draw(seeds())).abs().float().clamp(max=8)
    order = torch.argsort(normal((batch, tokens), draw(seeds())), dim=1)[:, :count]
    drift.scatter_add_(1, order, torch.full(order.shape, 100.0))
    return Spiked(drift, tuple(tuple(sorted(row)) for row in order.tolist()))


@st.composite
def tied_drifts(draw: Any, max_tokens: int = 40) -> Tensor:
    """Drift tensors ``[B, N]`` float32 with few different values, hence many ties."""
    batch, tokens, values = draw(st.integers(1, 3)), draw(st.integers(1, max_tokens)), draw(st.integers(1, 4))
    whole = (normal((batch, tokens), draw(seeds())).abs() * 100).long()
    drift: Tensor = whole.remainder(values).float()
    return drift


def fractions() -> st.SearchStrategy[float]:
    """Shares of tokens in (0, 1], written with at most three decimals."""
    return st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)


def policies() -> st.SearchStrategy[DriftPolicy]:
    """Valid drift policies."""
    return st.builds(
        DriftPolicy,
        fraction=fractions(),
        sensitivity=st.floats(0, 4),
        warmup=st.integers(0, 4),
        max_regenerations=st.integers(0, 2),
        persist=st.booleans(),
    )


@st.composite
def dead_keys(draw: Any, samples: int, keys: int) -> Tensor:
    """Which keys are dead: BoolTensor ``[samples, keys]``, at least one alive for each sample."""
    dead: Tensor = normal((samples, keys), draw(seeds())) > draw(st.floats(-1, 2))
    dead[torch.arange(samples), draw(st.integers(0, keys - 1))] = False
    return dead


@st.composite
def key_layouts(draw: Any, roles: tuple[Role, ...] = tuple(Role)) -> KeyLayout:
    """Key layouts on one small grid, in frame order; OTHER segments stand anywhere, the chunk itself last."""
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    segments, frame = [], 0
    inner = [role for role in roles if role is not Role.CURRENT]
    for role in draw(st.lists(st.sampled_from(inner), max_size=4)) if inner else []:
        count = draw(st.integers(1, 3))
        segments.append(Segment(role, range(frame, frame + count), height, width))
        frame += count
    segments.append(Segment(Role.CURRENT, range(frame, frame + draw(st.integers(1, 2))), height, width))
    return KeyLayout(tuple(segments))


__all__ = [
    "FLOATS",
    "Latents",
    "Spiked",
    "dead_keys",
    "fractions",
    "key_layouts",
    "latents",
    "normal",
    "policies",
    "seeds",
    "spiked_drifts",
    "tied_drifts",
]
