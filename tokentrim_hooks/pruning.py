"""Pruning that is exact: dead tokens never reach the attention kernel.

Two ways, one tap. Caches that hold K/V rows carry *tombstones*: one infinite element in the V row of a dead token.
The mark travels with the row through native rolls, sinks and copies, dies when the row is overwritten, and poisons
the output loudly if an attention path was missed. Contexts that lie in the sequence are pruned by *key selection*:
a ledger of dead (frame, token) pairs and the adapter's key layout say which keys are live. Either way the tap hands
only live rows of K and V to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from tokentrim_hooks.adapter import CacheRows, KeyLayout, Role, Segment, require_floating
from tokentrim_hooks.errors import UnsupportedContextError

PRUNABLE = frozenset({Role.CONTEXT, Role.FLIGHT})

_current: ContextVar[CallTap | None] = ContextVar("tokentrim_call", default=None)


class Busy:
    """Whether any tap of the process is at work: a plain attribute, which compiled code can guard on.

    While it is False, tapped functions run as if they were not tapped, without a graph break.
    """

    def __init__(self) -> None:
        self.taps = 0
        self.now = False

    def change(self, by: int) -> None:
        """Count taps in and out."""
        self.taps += by
        self.now = self.taps > 0


BUSY = Busy()


# ---------------------------------------------------------------------------------------------- tombstones

def mark_of(dtype: torch.dtype) -> float:
    """Value of a tombstone: +inf, or NaN where the type has no infinity (fp8 ``*fn`` types)."""
    return float("nan") if "float8" in str(dtype) and "fn" in str(dtype) else float("inf")


def alive_rows(values: Tensor) -> Tensor:
    """Rows of V ``[B, rows, heads, head_dim]`` that carry no tombstone: BoolTensor ``[B, rows]`` on the device."""
    return torch.isfinite(values[:, :, 0, 0].float())


@dataclass
class Tombstones:
    """Marks in the V rows of one or more KV caches, and what they replaced, for as long as rows have not moved."""

    replaced: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def mark(self, rows: CacheRows, tokens: Sequence[Sequence[int]], prune_anchors: bool = False) -> int:
        """Mark all cached positions of ``tokens`` (one list a sample; empty = spare it); return rows marked."""
        require_floating(rows.values)
        first = rows.start if prune_anchors else rows.start + rows.anchors
        sample, row = _positions(tokens, first, rows.stop, rows.tokens)
        if not sample:
            return 0
        places = torch.tensor([sample, row])
        on_device: dict[torch.device, Tensor] = {}
        for values in rows.values:
            index = on_device.setdefault(values.device, places.to(values.device))
            self.replaced.append((values, index, values[index[0], index[1], 0, 0].clone()))
            values[index[0], index[1], 0, 0] = mark_of(values.dtype)
        return len(sample)

    def revive(self) -> None:
        """Put back what the marks replaced. Only valid while no row has moved since."""
        for values, index, old in reversed(self.replaced):
            values[index[0], index[1], 0, 0] = old
        self.replaced.clear()

    def settle(self) -> None:
        """Forget what the marks replaced: they are final."""
        self.replaced.clear()


def _positions(
    tokens: Sequence[Sequence[int]], first: int, stop: int, per_frame: int
) -> tuple[list[int], list[int]]:
    """(sample, row) of every cached copy of the tokens in rows ``first..stop``."""
    if first % per_frame:
        raise UnsupportedContextError(f"history starts at row {first}, not at a frame of {per_frame} rows")
    pairs = [
        (sample, frame + token)
        for sample, chosen in enumerate(tokens)
        for frame in range(first, stop, per_frame)
        for token in chosen
        if frame + token < stop
    ]
    return [sample for sample, _ in pairs], [row for _, row in pairs]


def clear_marks(values: Iterable[Tensor]) -> None:
    """Make rows whose mark cannot be undone finite again (0 in the marked element), so that nothing is poisoned."""
    for value in values:
        element = value[:, :, 0, 0]
        element.copy_(torch.where(torch.isfinite(element.float()), element, torch.zeros_like(element)))


# ---------------------------------------------------------------------------------------------- key selection

@dataclass
class Ledger:
    """Dead tokens of contexts that lie in the sequence: which chunk killed which token of which frame, per sample.

    ``killed[frame]`` is a CPU LongTensor ``[B, tokens]``: the start frame of the killing chunk, or ALIVE.
    """

    ALIVE = 2**62

    prune_anchors: bool = False
    coarse: str = "any"
    """A key that covers several tokens dies with ``"any"`` of them, or only with ``"all"`` of them."""
    killed: dict[int, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] = (0, 0)

    def kill(
        self, layout: KeyLayout, tokens: Sequence[Sequence[int]], chunk: int, grid: tuple[int, int]
    ) -> int:
        """Kill ``tokens`` (one list a sample) of ``grid`` in all context frames; return the tokens newly dead."""
        before, self.grid = self.dead, grid
        for segment in layout.segments:
            if segment.role in PRUNABLE or (segment.role is Role.ANCHOR and self.prune_anchors):
                for frame in segment.frames:
                    self._kill_in_frame(frame, grid[0] * grid[1], tokens, chunk)
        return self.dead - before

    @property
    def dead(self) -> int:
        """Number of dead (sample, frame, token) triples."""
        return sum(int((mask < self.ALIVE).sum()) for mask in self.killed.values())

    def _kill_in_frame(self, frame: int, size: int, tokens: Sequence[Sequence[int]], chunk: int) -> None:
        mask = self.killed.setdefault(frame, torch.full((len(tokens), size), self.ALIVE))
        for sample, chosen in enumerate(tokens):
            mask[sample, list(chosen)] = mask[sample, list(chosen)].clamp(max=chunk)

    def forget(self, chunk: int) -> None:
        """Bring back what ``chunk`` killed."""
        for mask in self.killed.values():
            mask[mask == chunk] = self.ALIVE

    def live(self, layout: KeyLayout, samples: int) -> list[QueryGroup]:
        """Live keys of a layout, per group of queries that see the same (CPU masks)."""
        flight = {f for s in layout.segments if s.role is Role.FLIGHT for f in s.frames}
        if not flight & self.killed.keys():
            return [QueryGroup(0, layout.length, self._live_mask(layout, samples, self.ALIVE))]
        groups, place = [], 0
        for segment in layout.segments:
            asker = {Role.FLIGHT: min(segment.frames, default=0), Role.CURRENT: self.ALIVE}.get(segment.role, -1)
            mask = self._live_mask(layout, samples, asker)
            groups.append(QueryGroup(place, place + segment.length, mask))
            place += segment.length
        return groups

    def _live_mask(self, layout: KeyLayout, samples: int, asker: int) -> Tensor:
        """Keys that queries of the chunk starting at ``asker`` may see: chunks in flight hide only from later ones."""
        parts = [torch.ones(samples, 0, dtype=torch.bool)]
        for segment in layout.segments:
            limit = {Role.CONTEXT: self.ALIVE, Role.FLIGHT: asker}.get(segment.role, -1)
            if segment.role is Role.ANCHOR and self.prune_anchors:
                limit = self.ALIVE
            parts.append(self._segment_mask(segment, samples, limit))
        return torch.cat(parts, dim=1)

    def _segment_mask(self, segment: Segment, samples: int, limit: int) -> Tensor:
        """Live keys of one segment, ``[B, keys]``."""
        if limit < 0 or not any(frame in self.killed for frame in segment.frames):
            return torch.ones(samples, segment.length, dtype=torch.bool)
        dead = torch.stack([self._dead_in_frame(frame, samples, limit) for frame in segment.frames], dim=1)
        if segment.scale != (1, 1, 1):
            dead = coarsened(dead, segment.scale, self.coarse)[:, :, : segment.height, : segment.width]
        return ~dead.flatten(1)

    def _dead_in_frame(self, frame: int, samples: int, limit: int) -> Tensor:
        """Tokens of a frame that are dead to the asker, ``[B, height, width]``."""
        if frame not in self.killed:
            return torch.zeros(samples, *self.grid, dtype=torch.bool)
        killed = self.killed[frame]
        return ((killed != self.ALIVE) & (killed <= limit)).view(samples, *self.grid)


def coarsened(dead: Tensor, scale: tuple[int, int, int], rule: str) -> Tensor:
    """Dead keys of a coarse segment: ``[B, F, H, W]`` of fine tokens to ``[B, F/t, H/h, W/w]``, rounded up.

    A coarse key at the border that covers fewer tokens is judged by those that exist.
    """
    t, h, w = scale
    padding = [amount for size, step in zip(dead.shape[:0:-1], (w, h, t), strict=True) for amount in (0, -size % step)]
    padded = torch.nn.functional.pad(dead, padding, value=rule == "all")
    blocks = rearrange(padded, "b (f t) (i h) (j w) -> b f i j (t h w)", t=t, h=h, w=w)
    return blocks.all(-1) if rule == "all" else blocks.any(-1)


# ---------------------------------------------------------------------------------------------- attention

@dataclass(frozen=True)
class QueryGroup:
    """Queries ``start..stop`` see the keys that are True in ``alive``, a CPU BoolTensor ``[B, keys]``."""

    start: int
    stop: int | None
    alive: Tensor


@dataclass(frozen=True)
class Keep:
    """A query group ready for the kernel: one index for all samples, or one a sample."""

    start: int
    stop: int | None
    index: tuple[Tensor, ...]


def keeps_of(groups: Sequence[QueryGroup], device: torch.device) -> tuple[Keep, ...]:
    """Turn masks into key indices on the device; a single index where all samples keep the same keys."""
    keeps = []
    for group in groups:
        rows = group.alive[:1] if bool((group.alive == group.alive[:1]).all()) else group.alive
        if not bool(rows.any(dim=1).all()):
            raise UnsupportedContextError("pruning would leave a sample with no key at all")
        index = tuple(row.nonzero().squeeze(1).to(device, non_blocking=True) for row in rows)
        keeps.append(Keep(group.start, group.stop, index))
    return tuple(keeps)


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def attend_live(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keeps: Sequence[Keep]) -> Tensor:
    """Run ``attend`` on live keys only.

    q, k, v are ``[B, length, heads, head_dim]``; ``mask`` broadcasts over ``[B, heads, queries, keys]``. Queries of
    different groups, and samples that keep different keys, run one after the other.
    """
    outputs = []
    for keep in keeps:
        some_q, some_mask = q, mask
        if len(keeps) > 1:
            some_q = q[:, keep.start : keep.stop]
            some_mask = _rows(mask, keep.start, keep.stop)
        outputs.append(_attend_group(attend, some_q, k, v, some_mask, keep.index))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_group(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, index: Sequence[Tensor]
) -> Tensor:
    if len(index) == 1:
        return attend(q, k.index_select(1, index[0]), v.index_select(1, index[0]), _columns(mask, index[0]))
    samples = []
    for b, keys in enumerate(index):
        one = slice(b, b + 1)
        own = mask[one] if mask is not None and mask.ndim == 4 and mask.shape[0] > 1 else mask
        samples.append(
            attend(q[one], k[one].index_select(1, keys), v[one].index_select(1, keys), _columns(own, keys))
        )
    return torch.cat(samples, dim=0)


def _columns(mask: Tensor | None, keys: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[-1] == 1 else mask.index_select(-1, keys)


def _rows(mask: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., start:stop, :]


class CallTap:
    """What the attention tap knows during one denoiser call: live keys, computed once and shared by all layers."""

    def __init__(self, layout: KeyLayout | None, ledger: Ledger, gated: bool = False) -> None:
        self.layout = layout
        self.ledger = ledger
        self.gated = gated
        self.calls = 0
        self.dropped = 0
        self._keeps: dict[int, tuple[Keep, ...]] = {}

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with the live keys only, counting what was dropped."""
        keeps = self._keeps.get(k.shape[1])
        if keeps is None:
            keeps = self._keeps[k.shape[1]] = keeps_of(self._groups(k, v), k.device)
        self.calls += 1
        dropped = max(k.shape[1] - index.numel() for keep in keeps for index in keep.index)
        self.dropped = max(self.dropped, dropped)
        return attend_live(attend, q, k, v, mask, keeps) if dropped else attend(q, k, v, mask)

    def _groups(self, k: Tensor, v: Tensor) -> list[QueryGroup]:
        if self.layout is None:
            return [QueryGroup(0, None, alive_rows(v).cpu())]
        if k.shape[1] != self.layout.length:
            raise UnsupportedContextError(
                f"self attention sees {k.shape[1]} keys, the adapter's key layout says {self.layout.length}"
            )
        return self.ledger.live(self.layout, k.shape[0])


def current_tap() -> CallTap | None:
    """The tap of the denoiser call that is running in this thread or task, if something in its context is dead."""
    return _current.get()


def enter_tap(tap: CallTap | None) -> Token[CallTap | None]:
    """Make ``tap`` the current one; give the token back to :func:`leave_tap`."""
    BUSY.change(tap is not None)
    return _current.set(tap)


def leave_tap(token: Token[CallTap | None]) -> None:
    """Undo :func:`enter_tap`."""
    BUSY.change(-(_current.get() is not None))
    _current.reset(token)
