"""Where a model keeps its context: in rows of a KV cache, or as keys in the attention sequence itself."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.errors import UnsupportedContextError


class Role(enum.Enum):
    """What the keys of a segment are to the chunk being generated."""

    CONTEXT = "context"
    """Finished earlier frames: may be pruned."""
    FLIGHT = "flight"
    """Earlier frames that are still being denoised: pruned for later chunks only."""
    ANCHOR = "anchor"
    """Sinks, pinned or first frames: kept unless the policy asks for ``prune_anchors``."""
    CURRENT = "current"
    """The newest chunk itself: never pruned."""
    OTHER = "other"
    """Text, padding, registers: never pruned."""


@dataclass(frozen=True)
class Segment:
    """A run of keys, frame-major then row-major.

    ``frames`` are the absolute latent frames covered, in order (any int for OTHER); ``height`` and ``width`` the
    grid of keys. With ``scale = (t, h, w)`` one key covers t frames and h x w tokens of the chunk's own grid.
    """

    role: Role
    frames: Sequence[int]
    height: int
    width: int
    scale: tuple[int, int, int] = (1, 1, 1)

    @property
    def length(self) -> int:
        """Number of keys in the segment."""
        return -(-len(self.frames) // self.scale[0]) * self.height * self.width


@dataclass(frozen=True)
class KeyLayout:
    """A context that lies in the attention sequence itself; pruned by selecting keys at the kernel.

    ``attentions`` is the number of attention calls over these keys in one denoiser call, where known: the self-check of
    the first prune expects as many.
    """

    segments: tuple[Segment, ...]
    attentions: int = 0

    @property
    def length(self) -> int:
        """Number of keys that self attention sees."""
        return sum(segment.length for segment in self.segments)

    @property
    def frames(self) -> set[int]:
        """Latent frames that have a key."""
        return {frame for segment in self.segments if segment.role is not Role.OTHER for frame in segment.frames}


@dataclass(frozen=True)
class CacheRows:
    """A context that lies in a KV cache; pruned by tombstones in V.

    Attributes:
        values: the V tensor of every layer, ``[B, rows, heads, head_dim]``; looked up anew for every call. Also views
            ``[B, frames, rows_per_frame, heads, head_dim]``, of layers that attend per site: row ``r`` is then token
            ``r % rows_per_frame`` of frame ``r // rows_per_frame``.
        start: first row that holds history.
        stop: row behind the last one that holds history (rows of the current chunk excluded).
        rows_per_frame: row ``r`` holds spatial token ``r % rows_per_frame``.
        anchors: rows from ``start`` on that are sinks; kept unless the policy asks for ``prune_anchors``.
        current: (first, behind the last) row of the current chunk where it lies amid history, as in a ring buffer.
        keys: the K tensor of every layer, like ``values``; needed only by policies that rewrite K.
        attentions: attention calls over these rows in one denoiser call, where it is not one per tensor in ``values``.
        end: latent frame behind the newest one that is finished, for policies that compare frames; default: the frame
            at which the call starts.
        frames: (latent frame, first row) of every finished frame behind the anchors, oldest first, where rows lie in
            another order: a ring whose slots are not all overwritten in turn.
    """

    values: Sequence[Tensor]
    start: int
    stop: int
    rows_per_frame: int
    anchors: int = 0
    current: tuple[int, int] = (0, 0)
    keys: Sequence[Tensor] = ()
    attentions: int = 0
    end: int | None = None
    frames: Sequence[tuple[int, int]] = ()

    @property
    def frame_rows(self) -> list[int]:
        """First row of every finished frame, oldest first: sinks, then what lies behind the current chunk in a ring."""
        step, head = self.rows_per_frame, self.start + self.anchors
        if self.frames:
            return [*range(self.start, head - step + 1, step), *(row for _, row in self.frames)]
        runs = [(self.start, head)]
        if self.current[1] > self.current[0]:
            runs += [(max(self.current[1], head), self.stop), (head, min(self.current[0], self.stop))]
        else:
            runs += [(head, self.stop)]
        return [row for first, stop in runs for row in range(first, stop - step + 1, step)]

    @property
    def tells_frames(self) -> bool:
        """Whether the adapter says which frame is where; else that is told by the order of rows, oldest first."""
        return bool(self.frames) or self.current[1] > self.current[0]

    def own_rows(self, frames: int) -> tuple[int, int]:
        """(first, behind the last) row of the current chunk of ``frames`` frames."""
        here = self.current if self.current[1] > self.current[0] else None
        return here or (self.stop, self.stop + frames * self.rows_per_frame)


Context = CacheRows | KeyLayout


def anchor_frames(context: Context) -> int:
    """Number of frames of a context that are sinks or anchors."""
    if isinstance(context, CacheRows):
        return context.anchors // context.rows_per_frame
    return len({frame for segment in context.segments if segment.role is Role.ANCHOR for frame in segment.frames})


def require_grid(context: Context, grid: tuple[int, int]) -> None:
    """Raise UnsupportedContextError unless a frame of a cache has as many rows as the chunk's grid has tokens."""
    if not isinstance(context, CacheRows) or not context.values:
        return
    height, width = grid
    if context.rows_per_frame != height * width:
        raise UnsupportedContextError(
            f"the chunk's grid is {height} x {width} tokens, but its context says "
            f"rows_per_frame={context.rows_per_frame}.\n"
            "A token must be a row of every frame: mend the adapter's patch_size or its context()."
        )


def require_floating(values: Sequence[Tensor]) -> None:
    """Raise UnsupportedContextError unless every layer's V can hold a mark (inf, or NaN in fp8)."""
    for value in values:
        if not torch.is_tensor(value) or not value.dtype.is_floating_point:
            kind = str(value.dtype) if torch.is_tensor(value) else type(value).__name__
            raise UnsupportedContextError(
                f"the KV cache holds {kind}, which cannot carry a tombstone; run with an unquantised cache"
            )


def require_history(context: CacheRows, start: int, samples: int) -> None:
    """Raise UnsupportedContextError unless history can be the frames before latent frame ``start``, and nothing else.

    Rows of something else among them (text, registers) move the tokens of all that lie behind; and guidance may keep
    both branches of a sample in one cache.
    """
    # Of a ring, whose frames are not all there before it is full, the chunk's own slots are none of history.
    rows, most = context.stop - context.start, context.end if context.end is not None else start
    rows -= max(min(context.current[1], context.stop) - max(context.current[0], context.start), 0)
    if not context.frames and (rows % context.rows_per_frame or rows > most * context.rows_per_frame):
        raise UnsupportedContextError(
            f"history takes {rows} rows of the KV cache, not {most} frames of {context.rows_per_frame} at most: does "
            "it keep more?\nWrite an adapter that says where frames begin."
        )
    held = int(context.values[0].shape[0]) if context.values else samples
    if held != samples:
        raise UnsupportedContextError(
            f"the KV cache holds {held} samples for a call of {samples}: whose are they (both branches of guidance?).\n"
            "Give each branch a cache and a call of its own, or write an adapter."
        )


def require_rows(context: CacheRows) -> None:
    """Raise UnsupportedContextError unless a cache has as many rows as history is said to take."""
    values = context.values[0]
    rows = int(values.shape[1]) if values.ndim == 4 else int(values.shape[1] * values.shape[2])
    if context.stop > rows:
        raise UnsupportedContextError(
            f"history ends at row {context.stop} of a cache of {rows} rows: do other ranks keep the rest?\n"
            "Run on one device, or mend the adapter's context()."
        )
