"""Key selection, for contexts that lie in the sequence: which (frame, token) pairs are dead, which keys that leaves.

Nothing is written into the model: the dead are remembered here, and the tap leaves their keys out of every call.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from tokentrim_hooks.pruning.context import KeyLayout, Role, Segment
from tokentrim_hooks.pruning.samples import Samples

PRUNABLE = frozenset({Role.CONTEXT, Role.FLIGHT})

# Three start frames that no chunk has. They are compared with real ones, so their order matters: NOBODY is before every
# chunk, NEWEST behind every chunk, and ALIVE behind NEWEST, so that ``killed_by <= NEWEST`` is False for the living.
NOBODY = -1
NEWEST = 2**62 - 1
ALIVE = 2**62


@dataclass(frozen=True)
class QueryGroup:
    """Queries ``start..stop`` see the keys that are True in ``alive``, a CPU BoolTensor ``[B, keys]``."""

    start: int
    stop: int | None
    alive: Tensor


@dataclass
class DeadTokens:
    """Dead tokens of contexts that lie in the sequence: which chunk killed which token of which frame, per sample.

    Chunks are named by the latent frame at which they start. ``killed_by[frame]`` is a CPU LongTensor ``[B, N]``: per
    token the earliest chunk that killed it, or ALIVE.

    Args:
        prune_anchors: whether anchors die too.
        coarse: a key that covers several tokens dies with ``"any"`` of them, or only with ``"all"`` of them.
    """

    prune_anchors: bool = False
    coarse: str = "any"
    killed_by: dict[int, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] = (0, 0)

    def __bool__(self) -> bool:
        """Whether anything is dead."""
        return bool(self.killed_by)

    def __len__(self) -> int:
        """Number of dead (sample, frame, token) triples."""
        return sum(int((killers < ALIVE).sum()) for killers in self.killed_by.values())

    def kill(
        self, layout: KeyLayout, tokens: Sequence[Sequence[int]], start: int, grid: tuple[int, int]
    ) -> int:
        """Kill ``tokens`` in all context frames of a layout.

        Args:
            layout: where the context lies.
            tokens: one list per sample, row-major over ``grid``; an empty one spares the sample.
            start: latent frame at which the killing chunk starts.
            grid: (height, width) of the chunk's own token grid.

        Returns:
            Number of (sample, frame, token) triples newly dead.
        """
        before, self.grid = len(self), grid
        for segment in layout.segments:
            if segment.role in PRUNABLE or (segment.role is Role.ANCHOR and self.prune_anchors):
                for frame in segment.frames:
                    self._kill_in_frame(frame, grid[0] * grid[1], tokens, start)
        self._drop_living_frames()
        return len(self) - before

    def _kill_in_frame(self, frame: int, size: int, tokens: Sequence[Sequence[int]], start: int) -> None:
        killers = self.killed_by.setdefault(frame, torch.full((len(tokens), size), ALIVE))
        for sample, chosen in enumerate(tokens):
            # The earliest killer counts: what it hid from later chunks stays hidden from them.
            killers[sample, list(chosen)] = killers[sample, list(chosen)].clamp(max=start)

    @classmethod
    def hiding(
        cls, frames: Sequence[int], hidden: Tensor, grid: tuple[int, int], coarse: str = "any"
    ) -> DeadTokens:
        """Tokens hidden from one call: from all of its queries, but for those of their own chunk in a packed call.

        Each frame is killed for what lies behind it, so that :meth:`live_for` spares a chunk that the same call writes.

        Args:
            frames: latent frames of a layout. hidden: CPU BoolTensor ``[B, frames, N]``.
            grid: (height, width) of the chunk's own token grid. coarse: see the class.
        """
        killed_by = {
            frame: torch.where(hidden[:, place], frame + 1, ALIVE)
            for place, frame in enumerate(frames)
            if bool(hidden[:, place].any())
        }
        return cls(True, coarse, killed_by, grid)

    def of(self, part: Samples) -> DeadTokens:
        """The dead tokens of some samples, for a call that is made with these alone."""
        killed_by = {frame: part.of(killers) for frame, killers in self.killed_by.items()}
        return DeadTokens(self.prune_anchors, self.coarse, killed_by, self.grid)

    def revive(self, start: int) -> None:
        """Bring back what the chunk at latent frame ``start`` killed."""
        for killers in self.killed_by.values():
            killers[killers == start] = ALIVE
        self._drop_living_frames()

    def forget(self, seen: Container[int]) -> None:
        """Forget frames that are not ``seen``: they have left the context, and numbers do not come again in a video."""
        self.killed_by = {frame: killers for frame, killers in self.killed_by.items() if frame in seen}

    def _drop_living_frames(self) -> None:
        # A frame without a dead token must not keep the tap on for the rest of the video.
        self.killed_by = {f: killers for f, killers in self.killed_by.items() if bool((killers < ALIVE).any())}

    def live(self, layout: KeyLayout, samples: int) -> list[QueryGroup]:
        """Live keys of a layout, per group of queries that see the same (CPU masks).

        A chunk that is still being denoised may not see what later chunks pruned: to its queries those tokens are part
        of a context that was fine when it began. So where such chunks are in the sequence, each segment asks apart.
        """
        flight = {f for s in layout.segments if s.role is Role.FLIGHT for f in s.frames}
        if not flight & self.killed_by.keys():
            return [QueryGroup(0, layout.length, self._live_mask(layout, samples, asker=NEWEST))]
        groups, place = [], 0
        for segment in layout.segments:
            mask = self._live_mask(layout, samples, _asker_of(segment))
            groups.append(QueryGroup(place, place + segment.length, mask))
            place += segment.length
        return groups

    def live_for(self, layout: KeyLayout, samples: int, start: int) -> Tensor:
        """Keys alive to queries of the chunk at latent frame ``start``, ``[B, keys]``: later prunes do not bind it."""
        return self._live_mask(layout, samples, asker=start, of_context=start)

    def _live_mask(self, layout: KeyLayout, samples: int, asker: int, of_context: int = NEWEST) -> Tensor:
        """Keys that queries of the chunk ``asker`` may see, ``[B, keys]``.

        A killer binds an asker that starts no earlier than itself. Finished frames are hidden by all killers up to
        ``of_context``; frames in flight only by those up to the asker; text and the current chunk by none.
        """
        parts = [torch.ones(samples, 0, dtype=torch.bool)]
        latest_killer = {Role.CONTEXT: of_context, Role.FLIGHT: asker}
        if self.prune_anchors:
            latest_killer[Role.ANCHOR] = NEWEST
        for segment in layout.segments:
            parts.append(self._segment_mask(segment, samples, latest_killer.get(segment.role, NOBODY)))
        return torch.cat(parts, dim=1)

    def _segment_mask(self, segment: Segment, samples: int, latest_killer: int) -> Tensor:
        """Live keys of one segment, ``[B, keys]``."""
        if latest_killer == NOBODY or not any(frame in self.killed_by for frame in segment.frames):
            return torch.ones(samples, segment.length, dtype=torch.bool)
        dead = torch.stack([self._dead_in_frame(frame, samples, latest_killer) for frame in segment.frames], dim=1)
        if segment.scale != (1, 1, 1):
            dead = coarsened(dead, segment.scale, self.coarse)[:, :, : segment.height, : segment.width]
        return ~dead.flatten(1)

    def _dead_in_frame(self, frame: int, samples: int, latest_killer: int) -> Tensor:
        """Tokens of a frame that some chunk up to ``latest_killer`` killed, ``[B, height, width]``."""
        if frame not in self.killed_by:
            return torch.zeros(samples, *self.grid, dtype=torch.bool)
        dead = (self.killed_by[frame] <= latest_killer).view(-1, *self.grid)
        # Guidance branches that share a batch share the verdict of the one that is judged.
        return dead.repeat(samples // dead.shape[0], 1, 1)


def _asker_of(segment: Segment) -> int:
    """The chunk whose queries a segment holds: a frame in flight asks for itself, text and finished frames see all."""
    if segment.role is Role.CURRENT:
        return NEWEST
    return min(segment.frames, default=0) if segment.role is Role.FLIGHT else NOBODY


def coarsened(dead: Tensor, scale: tuple[int, int, int], rule: str) -> Tensor:
    """Dead keys of a coarse segment: ``[B, F, H, W]`` of fine tokens to ``[B, F/t, H/h, W/w]``, rounded up.

    A coarse key at the border that covers fewer tokens is judged by those that exist.
    """
    t, h, w = scale
    padding = [amount for size, step in zip(dead.shape[:0:-1], (w, h, t), strict=True) for amount in (0, -size % step)]
    padded = torch.nn.functional.pad(dead, padding, value=rule == "all")
    blocks = rearrange(padded, "b (f t) (i h) (j w) -> b f i j (t h w)", t=t, h=h, w=w)
    return blocks.all(-1) if rule == "all" else blocks.any(-1)
