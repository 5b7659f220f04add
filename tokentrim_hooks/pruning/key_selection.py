"""Key selection for contexts that lie in the sequence: which (frame, token) pairs are dead, which keys that leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from tokentrim_hooks.pruning.context import KeyLayout, Role, Segment

PRUNABLE = frozenset({Role.CONTEXT, Role.FLIGHT})


@dataclass(frozen=True)
class QueryGroup:
    """Queries ``start..stop`` see the keys that are True in ``alive``, a CPU BoolTensor ``[B, keys]``."""

    start: int
    stop: int | None
    alive: Tensor


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

    def live_for(self, layout: KeyLayout, samples: int, start: int) -> Tensor:
        """Keys alive to queries of the chunk at frame ``start``, ``[B, keys]``: later chunks' prunes are not theirs."""
        return self._live_mask(layout, samples, start, start)

    def _live_mask(self, layout: KeyLayout, samples: int, asker: int, finished: int = ALIVE) -> Tensor:
        """Keys that queries of the chunk starting at ``asker`` may see: chunks in flight hide only from later ones."""
        parts = [torch.ones(samples, 0, dtype=torch.bool)]
        for segment in layout.segments:
            limit = {Role.CONTEXT: finished, Role.FLIGHT: asker}.get(segment.role, -1)
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
        dead = ((killed != self.ALIVE) & (killed <= limit)).view(-1, *self.grid)
        # Guidance branches that share a batch share the verdict of the one that is judged.
        return dead.repeat(samples // dead.shape[0], 1, 1)


def coarsened(dead: Tensor, scale: tuple[int, int, int], rule: str) -> Tensor:
    """Dead keys of a coarse segment: ``[B, F, H, W]`` of fine tokens to ``[B, F/t, H/h, W/w]``, rounded up.

    A coarse key at the border that covers fewer tokens is judged by those that exist.
    """
    t, h, w = scale
    padding = [amount for size, step in zip(dead.shape[:0:-1], (w, h, t), strict=True) for amount in (0, -size % step)]
    padded = torch.nn.functional.pad(dead, padding, value=rule == "all")
    blocks = rearrange(padded, "b (f t) (i h) (j w) -> b f i j (t h w)", t=t, h=h, w=w)
    return blocks.all(-1) if rule == "all" else blocks.any(-1)
