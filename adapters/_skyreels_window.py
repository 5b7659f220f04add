"""The schedule of SkyReels-V2 diffusion forcing: which frames a window holds, and when each of them is denoised.

Pure bookkeeping over what the pipeline's ``prepare_latents`` and ``generate_timestep_matrix`` take and return.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokentrim_hooks import Role, Segment, shares_storage


class Block(NamedTuple):
    """Columns ``first..stop`` of the step matrix that are denoised in lockstep, from row ``begin`` on: a chunk."""

    begin: int
    first: int
    stop: int


@dataclass
class Window:
    """One iteration of the pipeline.

    Attributes:
        history: numbers of the frames that the video had before this window.
        frames: numbers of the window's frames. Frames are numbered in the order in which they are generated: that is
            their place in the video, unless the pipeline truncates the prefix to whole causal blocks; it then
            generates a few frames twice, keeps the first, and the second get numbers of their own.
        prefix: finished frames at the window's head.
        opens: whether a new video begins here.
        pinned: whether frame 0 is a given image.
        previous: the chunk before the window, as it was accepted ``[B, F, C, H, W]``, or None.
    """

    history: list[int]
    frames: list[int]
    prefix: int
    opens: bool
    pinned: bool
    previous: Callable[[], Tensor | None]
    matrix: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    steps: list[list[int]] = field(default_factory=list)
    updates: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    intervals: Sequence[tuple[int, int]] = ()
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0))
    clean: int = 0
    """Step index of a finished frame; 0 has not begun, ``j`` is about to be denoised at ``sigmas[j - 1]``."""
    checked: bool = False

    def plan(self, arguments: Mapping[str, Any], planned: Sequence[Any], sigmas: Tensor) -> None:
        """Take over what ``generate_timestep_matrix(**arguments)`` returned."""
        self.matrix, steps, self.updates, self.intervals = planned
        # Both live on the host; numpy() refuses a device tensor, so this can never become a hidden synchronisation.
        self.steps = steps.numpy().tolist()
        self.sigmas, self.clean = sigmas, len(arguments["step_template"]) + 1
        # The image-to-video pipeline appends the frames of a last image after it has prepared the latents.
        extra = int(arguments["num_latent_frames"]) - len(self.frames)
        self.frames += range(self.frames[-1] + 1, self.frames[-1] + 1 + extra)

    @cached_property
    def blocks(self) -> list[Block]:
        """Chunks of the window, in the order in which they begin. (Read late: a last image edits ``updates``.)"""
        columns = self.updates.numpy().T.tolist()
        begins = [column.index(True) if True in column else None for column in columns]
        blocks = []
        for begin, run in groupby(range(len(begins)), key=begins.__getitem__):
            members = list(run)
            if begin is not None:
                blocks.append(Block(begin, members[0], members[-1] + 1))
        return blocks

    def row(self, timestep: object) -> int | None:
        """Row of the step matrix that the pipeline is at: its current timestep is a view of that row."""
        if not isinstance(timestep, Tensor) or not shares_storage(timestep, self.matrix):
            return None
        return (timestep.storage_offset() - self.matrix.storage_offset()) // self.matrix.stride(0)

    def newest(self, row: int) -> int:
        """Ordinal of the chunk that began last."""
        return max(i for i, block in enumerate(self.blocks) if block.begin <= row)

    def segments(self, row: int, height: int, width: int) -> tuple[Segment, ...]:
        """What the keys of the window are to the newest chunk, in sequence order."""
        runs = groupby(range(*self.intervals[row]), key=lambda column: self._part(column, row))
        return tuple(
            Segment(role, [self.frames[column] for column in columns], height, width) for (role, _), columns in runs
        )

    def _part(self, column: int, row: int) -> tuple[Role, int]:
        """Role of a frame, and which chunk it belongs to (-1: it was there before)."""
        owner = next((i for i, block in enumerate(self.blocks) if block.first <= column < block.stop), -1)
        if (self.pinned and self.frames[column] == 0) or (owner < 0 and column >= self.prefix):
            return Role.ANCHOR, -1
        if owner < 0 or self.steps[row][column] >= self.clean:
            return Role.CONTEXT, -1
        # Frames that have not begun see what the newest chunk sees: without a causal mask it reads them, too.
        return (Role.FLIGHT if owner < self.newest(row) else Role.CURRENT), owner


def next_window(
    last: Window | None, given: Mapping[str, Any], latents: Tensor, prefix: Tensor | None, length: int
) -> Window:
    """The window after ``last``, from the arguments of ``prepare_latents`` and three of its results.

    ``latents`` is ``[B, C, F, H, W]``; ``prefix`` the finished latents that will fill its first ``length`` frames.
    """
    past: Tensor | None = given.get("video_latents")
    pinned, count = "image" in given, int(latents.shape[2])
    if past is None:
        clip = None if pinned or not length else prefix
        return Window([], list(range(count)), length, True, pinned, slice_of(clip, 0, length))
    overlap = int(given["overlap_history_latent_frames"])
    history = [] if last is None else last.history + last.frames[overlap if last.history else 0 :]
    opens = last is None or len(history) != past.shape[2]  # patched in the middle of a video
    if last is None or opens:
        history, before, fresh = list(range(past.shape[2])), 0, int(past.shape[2])
    else:
        start = last.frames[last.blocks[-1].first]
        before = next((i for i, number in enumerate(history) if number >= start), len(history) - 1)
        fresh = last.frames[-1] + 1
    frames = history[-overlap:][:length] + list(range(fresh, fresh + count - length))
    return Window(history, frames, length, opens, pinned, slice_of(past, before, len(history)))


def slice_of(latents: Tensor | None, begin: int, end: int) -> Callable[[], Tensor | None]:
    """Frames ``begin..end`` of the pipeline's tensor as ``[B, F, C, H, W]``, without keeping that tensor alive."""
    if latents is None:
        return lambda: None
    alive = weakref.ref(latents)

    def look() -> Tensor | None:
        tensor = alive()
        return None if tensor is None else tensor[:, :, begin:end].transpose(1, 2)

    return look


def chunk_of(latents: Tensor, block: Block, offset: int) -> Tensor:
    """Frames of a block: ``[B, C, window, H, W] -> [B, F, C, H, W]``."""
    return latents[:, :, block.first - offset : block.stop - offset].transpose(1, 2)
