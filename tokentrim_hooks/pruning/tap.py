"""The attention tap: dead tokens never reach the attention kernel.

Caches carry tombstones (tombstones.py); of contexts in the sequence we remember the dead (key_selection.py). Either way
the tap computes once per denoiser call which rows of K and V are live, and hands only those to the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.pruning.account import KeyAccount
from tokentrim_hooks.pruning.block_mask import is_block_mask, without_dead
from tokentrim_hooks.pruning.context import KeyLayout
from tokentrim_hooks.pruning.fleeting import FleetingMarks, Weighed
from tokentrim_hooks.pruning.key_selection import NEWEST, DeadTokens, QueryGroup
from tokentrim_hooks.pruning.layers import LayersAlike
from tokentrim_hooks.pruning.samples import Samples
from tokentrim_hooks.pruning.sharding import require_all_queries
from tokentrim_hooks.pruning.tombstones import alive_rows, hidden_rows


@dataclass(frozen=True)
class LiveKeys:
    """What a group of queries may see: an index of keys for every set of samples that keep the same ones.

    ``samples[i]`` are those of ``index[i]``; empty where one index holds for all. ``order`` puts the samples of all
    sets, one set behind the other, back into their places; None where they are in them.
    """

    start: int
    stop: int | None
    index: tuple[Tensor, ...]
    samples: tuple[Tensor, ...] = ()
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
    samples = tuple(_moved(part, device) for part in order.split(kind.bincount().tolist()))
    back = None if bool((order.diff() > 0).all()) else _moved(order.argsort(), device)
    return LiveKeys(group.start, group.stop, index, samples, back)


def _moved(index: Tensor, device: torch.device) -> Tensor:
    return index.to(device, non_blocking=True)


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def weighing(attend: Attend) -> Attend:
    """Attention whose softmax has a weight per key: ``sum w e v / sum w e``, for V times w with w as last channel.

    Exact with any kernel, which sees no weight: one launch for each of the two sums, with the head width that it knows.
    """

    def attend_twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        values, weights = v[..., :-1].contiguous(), v[..., -1:].expand_as(v[..., :-1]).contiguous()
        below, above = attend(q, k, weights, mask), attend(q, k, values, mask)
        wide = torch.promote_types(above.dtype, torch.float32)
        return (above.to(wide) / below.to(wide)).to(above.dtype)

    return attend_twice


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
        own = mask.index_select(0, some) if mask is not None and mask.ndim == 4 and mask.shape[0] > 1 else mask
        place = some[:, None], keys[None]
        parts.append(attend(q.index_select(0, some), k[place], v[place], _columns(own, keys)))
    output = torch.cat(parts, dim=0)
    return output if group.order is None else output.index_select(0, group.order)


def _of_each(group: LiveKeys, batch: int) -> Sequence[Tensor]:
    """The live keys of every sample, or one index where it holds for all."""
    each = list(group.index[:1]) * batch
    for some, keys in zip(group.samples, group.index, strict=False):
        for sample in some.tolist():
            each[sample] = keys
    return each if group.samples else group.index


def _columns(mask: Tensor | None, keys: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[-1] == 1 else mask.index_select(-1, keys)


def _rows(mask: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., start:stop, :]


class CallTap:
    """What the attention tap knows during one denoiser call: live keys, computed once and shared by all layers.

    Args:
        layout: where the context lies in the sequence; None for a KV cache, whose dead rows carry tombstones.
        dead: the dead tokens of a context in the sequence.
        gated: whether the tapped function also serves cross attention, and counts only inside self attention.
        failures: what follows a failure of ours in the middle of the model's own call.
        hidden: tokens of a context in the sequence that this one call may not read, by whoever hides them; in a cache
            they carry marks.
        veil: rows of a cache that are hidden from this call, or read with less weight; None for none.
        account: of a KV cache in which something is dead: asked whether the keys are its rows. own: rows of the chunk.
        part: samples that the call is made with, where not with all of the batch.

    Attributes:
        off: True once we have stepped aside: the original attention answers alone.
        calls: attention calls that were tapped. dropped: keys left out, at most in one of them. dead_keys: those of
            them that are dead, and not only hidden from this call. layers: compares what is dead in the layers.
    """

    def __init__(
        self,
        layout: KeyLayout | None,
        dead: DeadTokens,
        gated: bool = False,
        failures: FailurePolicy | None = None,
        hidden: Sequence[DeadTokens] = (),
        veil: FleetingMarks | None = None,
        account: KeyAccount | None = None,
        own: int = 0,
        part: Samples | None = None,
    ) -> None:
        self.veil, self._part = veil, part
        self._weighed: dict[tuple[int, torch.device], Weighed | None] = {}
        self.dead_keys = 0
        self.layout = layout
        self.hidden = hidden
        self.dead = dead
        self.gated = gated
        self.off = False
        self.calls = 0
        self.dropped = 0
        self._account, self._own = account, own
        self.layers: LayersAlike | None = None
        self._failures = failures or FailurePolicy()
        self._ranges_asked = 0
        self._live: dict[tuple[int, torch.device], tuple[LiveKeys, ...]] = {}
        self._ranges: dict[tuple[int, int, int], Tensor | None] = {}
        self._masks: dict[int, tuple[Any, Any]] = {}

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with the live keys only, counting what was dropped."""
        # Found for the first layer, shared by the others. By length too, for a call may attend over parts of its keys;
        # by device, for the layers of one model may lie on several.
        place = k.shape[1], k.device
        groups = self._live.get(place)
        if self.layers is not None:
            self.layers.look(v)
        if groups is None:
            weighed = self._weighed[place] = None if self.veil is None else self.veil.locate(self.calls, v)
            groups = self._live[place] = live_keys(self._groups(q, k, v, mask, weighed), k.device)
        rows = self._weighed[place]
        if rows is not None and self.veil is not None:
            v, attend = self.veil.weighed(self.calls, v, rows), weighing(attend)
        self.calls += 1
        dropped = max(k.shape[1] - index.numel() for group in groups for index in group.index)
        self.dropped = max(self.dropped, dropped)
        if dropped and is_block_mask(mask):
            return attend(q, k, v, self._hidden(mask, groups, k))
        # With nothing to drop the model's tensors go through untouched: bit-identical, and no copy.
        return attend_live(attend, q, k, v, mask, groups) if dropped else attend(q, k, v, mask)

    def steps_aside(self, failure: Exception) -> bool:
        """Whether a failure of ours is forgiven: then nothing more is dropped in this call."""
        self.off = self.off or self._failures.forgives(failure)
        return self.off

    @contextlib.contextmanager
    def counting_ranges(self) -> Iterator[None]:
        """Count a packed attention call as tapped if it asks for a live range meanwhile."""
        before = self._ranges_asked
        yield
        self.calls += self._ranges_asked > before

    def _hidden(self, mask: Any, groups: Sequence[LiveKeys], k: Tensor) -> Any:
        """The block mask without the dead keys, made once per call, for all layers are given the same mask."""
        if len(groups) > 1:
            raise UnsupportedContextError("chunks in flight cannot be pruned apart in flex attention; use sdpa")
        if id(mask) not in self._masks:
            self._masks[id(mask)] = (mask, without_dead(mask, _of_each(groups[0], k.shape[0]), k.shape[0], k.shape[1]))
        return self._masks[id(mask)][1]

    def live_range(self, start: int, first: int, stop: int, keys: Tensor) -> Tensor | None:
        """Live keys for one range of packed queries, for :meth:`Patches.tap_packed`.

        Args:
            start: latent frame at which the queries' chunk starts; what was pruned for later chunks is alive to it.
            first: first key that these queries see.
            stop: key behind the last one that they see.
            keys: all keys of the call, one sample: ``[length, ...]``.

        Returns:
            LongTensor, positions counted from ``first``, on the keys' device; None if all keys of the range live.
        """
        layout = self._layout_of(keys.shape[0])
        self._ranges_asked += 1
        place = (start, first, stop)
        if place not in self._ranges:
            self._ranges[place] = self._live_range(layout, start, first, stop, keys.device)
        live = self._ranges[place]
        self.dropped = max(self.dropped, 0 if live is None else stop - first - live.numel())
        return live

    def _live_range(self, layout: KeyLayout, start: int, first: int, stop: int, device: torch.device) -> Tensor | None:
        alive = self.dead.live_for(layout, 1, start)[0, first:stop]
        self._count_dead(alive)
        for hidden in self.hidden:
            alive = alive & hidden.live_for(layout, 1, start)[0, first:stop]
        if bool(alive.all()):
            return None
        if not bool(alive.any()):
            raise UnsupportedContextError("pruning would leave some queries with no key at all; choose fewer tokens")
        return alive.nonzero().squeeze(1).to(device, non_blocking=True)

    def _groups(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, weighed: Weighed | None) -> list[QueryGroup]:
        if self.layout is None:
            alive, seen = self._rows_seen(q, v, mask)
            return [QueryGroup(0, None, seen if weighed is None else alive & (weighed.weights > 0))]
        layout = self._layout_of(k.shape[1])
        groups = self.dead.live(layout, k.shape[0])
        for group in groups:
            self._count_dead(group.alive)
        for hidden in self.hidden:
            visible = hidden.live_for(layout, k.shape[0], NEWEST)
            groups = [QueryGroup(group.start, group.stop, group.alive & visible) for group in groups]
        return groups

    def _rows_seen(self, q: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        """Rows of a cache that are not dead, and those of them that are not hidden. The host is read once."""
        if not self.calls:
            require_all_queries(q.shape[1], self._own)
        flags = [alive_rows(v)]
        if self.veil is not None:
            flags.append(flags[0] | hidden_rows(v))
        # Accounted for in the first attention only, for all layers have the same rows; flex attention pads its keys.
        account, self._account, new = self._account, None, max(q.shape[1], self._own)
        padded = is_block_mask(mask)
        known = [] if account is None else account.asked(v, new, self._part)
        read = torch.stack([*flags, *known]).cpu()
        alive = read[len(flags) - 1]
        if account is not None:
            self.layers = account.layers
            account.answer(alive, read[len(flags) :], new, padded, self._part)
        self._count_dead(alive)
        return alive, read[0]

    def _count_dead(self, alive: Tensor) -> None:
        living = alive.sum(-1).view(-1).tolist() if alive.numel() else []
        self.dead_keys = max([self.dead_keys, *(alive.shape[-1] - count for count in living)])

    def _layout_of(self, keys: int) -> KeyLayout:
        """The key layout; raises unless it describes as many keys as self attention sees."""
        if self.layout is None or keys != self.layout.length:
            known = "has no key layout" if self.layout is None else f"says {self.layout.length}"
            raise UnsupportedContextError(
                f"self attention sees {keys} keys, the adapter's key layout {known}; correct context()"
            )
        return self.layout
