"""Videos of which only some frames are wanted, in a file or in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tokentrim_hooks.metrics.frames import Frames
from tokentrim_hooks.metrics.video import Pixels


class Clip(Protocol):
    """A video: :class:`~tokentrim_hooks.metrics.video.VideoFile`, or frames that are held."""

    def count(self) -> int:
        """Its number of frames."""
        ...

    def pick(self, numbers: Iterable[int], /) -> dict[int, Pixels]:
        """These frames, each ``[H, W, 3]`` uint8, by number."""
        ...


@dataclass(frozen=True, eq=False)
class Held:
    """Frames in memory, ``[T, H, W, 3]``, float in 0..1."""

    held: Frames

    def count(self) -> int:
        """Its number of frames."""
        return len(self.held)

    def pick(self, numbers: Iterable[int], /) -> dict[int, Pixels]:
        """These frames, each ``[H, W, 3]`` uint8, by number."""
        wanted = (number for number in numbers if number < len(self.held))
        return {number: (255 * self.held[number]).round().clip(0, 255).astype(np.uint8) for number in wanted}


def clip_of(video: Frames | Clip) -> Clip:
    """The video, whichever way it is given."""
    return Held(video) if isinstance(video, np.ndarray) else video
