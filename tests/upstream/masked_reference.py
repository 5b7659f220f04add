"""An independent reference: the real, unpatched loop whose attention masks dead keys with -inf.

Nothing of tokentrim is used. Which frame and position a key belongs to is found by *bit equality*: every row that
leaves a layer's value projection is remembered with its frame and position, so a key's V row tells its origin,
wherever rolls, sinks and copies have put it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Prune:
    """``tokens`` (one list per sample) of all earlier frames are dead from the chunk at latent frame ``start`` on.

    ``lasting=False`` brings them back when that chunk is committed.
    """

    start: int
    tokens: Sequence[Sequence[int]]
    lasting: bool = True


@dataclass(frozen=True)
class Source:
    """What the reference must know of a repository; arguments are the generator's, by name.

    ``start`` is the first latent frame of the call; ``commits`` whether it writes clean context; ``values`` the value
    projections, one per layer; ``namespace.attention(q, k, v)`` self attention over ``[B, length, heads, head_dim]``;
    ``tokens`` the spatial tokens of a frame.
    """

    generator: nn.Module
    namespace: Any
    values: Sequence[nn.Module]
    start: Callable[[Mapping[str, Any]], int]
    commits: Callable[[Mapping[str, Any]], bool]
    tokens: int


def fingerprints(rows: Tensor) -> Tensor:
    """64-bit fingerprint of the bits of every row: ``[B, rows, ...] -> LongTensor[B, rows]``."""
    bits = rows.flatten(2).contiguous().view(torch.int32).long()
    odd = torch.arange(bits.shape[-1]) * 0x9E3779B97F4A7C1 * 2 + 0x5851F42D4C957F2D
    return ((bits ^ (bits << 29)) * odd).sum(-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, dead: Tensor) -> Tensor:
    """Softmax attention written out, with -inf at the keys that ``dead`` ``[B, keys]`` names."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(dead[:, None, None], float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@dataclass
class MaskedReference:
    """``with MaskedReference(source, prunes) as reference: pipeline.inference(...)``.

    ``spared`` frames (sinks) are never dead. With ``drop=True`` dead keys are taken out and the repository's own
    attention is called, to compare bit for bit. ``masked`` collects, per attention call, the dead keys per sample.
    """

    source: Source
    prunes: Sequence[Prune] = ()
    spared: Collection[int] = ()
    drop: bool = False
    masked: list[list[int]] = field(default_factory=list)
    _known: list[tuple[int, Tensor]] = field(default_factory=list)
    _active: list[tuple[Prune, list[Tensor]]] = field(default_factory=list)
    _frame: int = 0

    def __enter__(self) -> MaskedReference:
        self._undo = ExitStack()
        handles = [self.source.generator.register_forward_pre_hook(self._before, with_kwargs=True)]
        handles += [value.register_forward_hook(self._remember) for value in self.source.values]
        for handle in handles:
            self._undo.callback(handle.remove)
        self._native = self.source.namespace.attention
        self._undo.enter_context(mock.patch.object(self.source.namespace, "attention", self._attention))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        self._frame = self.source.start(arguments)
        commits = self.source.commits(arguments)
        if commits:
            self._active = [item for item in self._active if item[0].lasting]
        begun = [prune for prune, _ in self._active]
        for prune in self.prunes:
            if prune.start == self._frame and not commits and prune not in begun:
                self._active.append((prune, self._dead_fingerprints(prune)))

    def _remember(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        marks = fingerprints(output)
        for i, frame in enumerate(marks.split(self.source.tokens, dim=1)):
            self._known.append((self._frame + i, frame))

    def _dead_fingerprints(self, prune: Prune) -> list[Tensor]:
        """Per sample, the fingerprints of all rows ever written for the pruned tokens of earlier frames."""
        frames = [marks for frame, marks in self._known if frame < prune.start and frame not in self.spared]
        known = torch.stack(frames)
        return [known[:, b, list(tokens)].flatten() for b, tokens in enumerate(prune.tokens)]

    def _dead(self, v: Tensor) -> Tensor:
        marks = fingerprints(v)
        dead = torch.zeros_like(marks, dtype=torch.bool)
        for _, per_sample in self._active:
            for b, fatal in enumerate(per_sample):
                dead[b] |= torch.isin(marks[b], fatal)
        return dead

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dead = self._dead(v)
        self.masked.append(dead.sum(1).tolist())
        if not self.drop:
            return masked_attention(q, k, v, dead)
        live = ~dead[0]
        assert bool((dead == dead[:1]).all()), "drop=True is for samples that lose the same keys"
        return self._native(q, k[:, live], v[:, live], *args, **kwargs) if bool(dead.any()) else self._native(q, k, v)


@dataclass
class WeighedReference(MaskedReference):
    """The same with log w, ``weights[token]``, added to the scores of rows of the prunes, one token each."""

    weights: Mapping[int, float] = field(default_factory=dict)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        marks = fingerprints(v)
        bias = torch.zeros(marks.shape)
        for prune, per_sample in self._active:
            for b, rows in enumerate(per_sample):
                bias[b, torch.isin(marks[b], rows)] = math.log(self.weights[prune.tokens[b][0]])
        self.masked.append((bias < 0).sum(1).tolist())
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + bias[:, None, None]
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
