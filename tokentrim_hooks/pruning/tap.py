"""The attention tap: dead tokens never reach the attention kernel.

Caches carry tombstones (tombstones.py); of contexts in the sequence we remember the dead (key_selection.py). Either way
the tap computes once per denoiser call which rows of K and V are live, and hands only those to the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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
from tokentrim_hooks.pruning.live_keys import Attend, LiveKeys, attend_live, live_keys, of_each
from tokentrim_hooks.pruning.samples import Samples
from tokentrim_hooks.pruning.sharding import require_all_queries
from tokentrim_hooks.pruning.tombstones import alive_rows, hidden_rows


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
            self._masks[id(mask)] = (mask, without_dead(mask, of_each(groups[0], k.shape[0]), k.shape[0], k.shape[1]))
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
        if self.veil is not None and not self.calls and self._part is None:
            self.veil.require_seen(read[0], new)
        if account is not None:
            self.layers = account.layers
            account.answer(read[0] if account.of_hidden else alive, read[len(flags) :], new, padded, self._part)
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
