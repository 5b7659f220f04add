"""Attention on live keys: masks as indices, one for all samples that keep the same keys, and the launches they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.pruning.key_selection import QueryGroup

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class LiveKeys:
    """What a group of queries may see: an index of keys for every set of samples that keep the same ones.

    ``samples[i]`` are those of ``index[i]``, a slice where they are neighbours; empty where one index holds for all.
    ``order`` puts the samples of all sets, one set behind the other, back into their places; None where they are in
    them.
    """

    start: int
    stop: int | None
    index: tuple[Tensor, ...]
    samples: tuple[Tensor | slice, ...] = ()
    order: Tensor | None = None


def live_keys(groups: Sequence[QueryGroup], device: torch.device) -> tuple[LiveKeys, ...]:
    """Turn masks into key indices on the device, one for all samples that keep the same keys."""
    return tuple(_live_in(group, device) for group in groups)


def _live_in(group: QueryGroup, device: torch.device) -> LiveKeys:
    rows, kind = (group.alive, None) if len(group.alive) == 1 else torch.unique(group.alive, dim=0, return_inverse=True)
    if not bool(rows.any(dim=1).all()):
        raise UnsupportedContextError("pruning would leave a sample with no key at all; choose fewer tokens")
    index = tuple(_moved(row.nonzero().squeeze(1), device) for row in rows)
    if kind is None or len(rows) == 1:
        return LiveKeys(group.start, group.stop, index)
    order = kind.argsort(stable=True)
    samples = tuple(_neighbours(part) or _moved(part, device) for part in order.split(kind.bincount().tolist()))
    back = None if bool((order.diff() > 0).all()) else _moved(order.argsort(), device)
    return LiveKeys(group.start, group.stop, index, samples, back)


def _neighbours(samples: Tensor) -> slice | None:
    """These ascending samples as a slice, with which a tensor is viewed and not copied; None if some lie apart."""
    first, last = int(samples[0]), int(samples[-1])
    return slice(first, last + 1) if last - first + 1 == len(samples) else None


def _moved(index: Tensor, device: torch.device) -> Tensor:
    return index.to(device, non_blocking=True)


def attend_live(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: Sequence[LiveKeys]
) -> Tensor:
    """Run ``attend`` on live keys only.

    q, k, v are ``[B, length, heads, head_dim]``; ``mask`` broadcasts over ``[B, heads, queries, keys]``. Queries of
    different groups, and sets of samples that keep different keys, run one after the other.
    """
    outputs = []
    for group in groups:
        some_q, some_mask = q, mask
        if len(groups) > 1:
            some_q = q[:, group.start : group.stop]
            some_mask = _rows(mask, group.start, group.stop)
        outputs.append(_attend_group(attend, some_q, k, v, some_mask, group))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_group(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: LiveKeys) -> Tensor:
    if not group.samples:
        keys = group.index[0]
        return attend(q, k.index_select(1, keys), v.index_select(1, keys), _columns(mask, keys))
    parts = []
    for some, keys in zip(group.samples, group.index, strict=True):
        own = _of_samples(mask, some) if mask is not None and mask.ndim == 4 and mask.shape[0] > 1 else mask
        live_k, live_v = (_rows_of(rows, some, keys) for rows in (k, v))
        parts.append(attend(_of_samples(q, some), live_k, live_v, _columns(own, keys)))
    output = torch.cat(parts, dim=0)
    return output if group.order is None else output.index_select(0, group.order)


def _of_samples(tensor: Tensor, some: Tensor | slice) -> Tensor:
    return tensor[some] if isinstance(some, slice) else tensor.index_select(0, some)


def _rows_of(rows: Tensor, some: Tensor | slice, keys: Tensor) -> Tensor:
    """The live keys of some samples, copied once at most: not at all where neighbours keep every key."""
    if keys.numel() == rows.shape[1]:
        return _of_samples(rows, some)
    return rows[some].index_select(1, keys) if isinstance(some, slice) else rows[some[:, None], keys[None]]


def of_each(group: LiveKeys, batch: int) -> Sequence[Tensor]:
    """The live keys of every sample, or one index where it holds for all."""
    each = list(group.index[:1]) * batch
    for some, keys in zip(group.samples, group.index, strict=False):
        for sample in range(batch)[some] if isinstance(some, slice) else some.tolist():
            each[sample] = keys
    return each if group.samples else group.index


def _columns(mask: Tensor | None, keys: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[-1] == 1 else mask.index_select(-1, keys)


def _rows(mask: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., start:stop, :]
