"""Reading videos frame by frame, with PyAV."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.extras import require
from tokentrim_hooks.metrics.frames import Frames, as_frames

Pixels = npt.NDArray[np.uint8]
RATE = 16.0
"""Frames per second of a video that does not say."""


@dataclass(frozen=True)
class VideoFile:
    """A video in a file, of which no more than a frame is in memory at a time.

    Attributes:
        path: the file. fps: frames per second. expected: number of frames by its header, which may be wrong; 0 where it
            does not say.
    """

    path: Path
    fps: float
    expected: int

    @classmethod
    def of(cls, path: str | Path) -> VideoFile:
        """Open it, and see that there is a video in it.

        Raises:
            VideoError: no such file, or not a video.
        """
        with _opened(Path(path)) as (container, stream):
            fps = float(stream.average_rate or RATE)
            seconds = float(container.duration or 0) / 1e6
            return cls(Path(path), fps, int(stream.frames) or round(seconds * fps))

    def frames(self) -> Iterator[Pixels]:
        """Its frames, each ``[H, W, 3]`` uint8 RGB.

        Raises:
            VideoError: it cannot be read to its end, holds no frame, or frames of several sizes.
        """
        count, sizes = 0, dict[str, None]()  # in the order in which they come
        try:
            with _opened(self.path) as (container, stream):
                for frame in container.decode(stream):
                    sizes[f"{frame.width}x{frame.height}"] = None
                    if len(sizes) > 1:
                        break
                    count += 1
                    yield frame.to_ndarray(format="rgb24")
        except VideoError as failure:
            if not count:
                raise
            words = f"{self.path} is damaged or cut off behind frame {count} of {self.expected or 'some'}"
            raise VideoError(f"{words}.\nMake it anew, or give the part that plays.") from failure
        if not count:
            raise VideoError(f"{self.path} holds no frame.\nGive a video that plays.")
        if len(sizes) > 1:
            raise VideoError(f"{self.path} changes its size: {' and '.join(sizes)}.\nScale it to one size first.")

    def cut_off(self, frames: int) -> str:
        """What to say where this many were found, and its header speaks of many more; else nothing."""
        if frames < 0.9 * self.expected:
            return f"ends at frame {frames}, where its header says {self.expected}; is it cut off?"
        return ""

    def count(self) -> int:
        """Its number of frames, by decoding all of them.

        Raises:
            VideoError: as :meth:`frames`.
        """
        with _opened(self.path) as (container, stream):
            return sum(1 for _ in container.decode(stream))

    def pick(self, numbers: Iterable[int], /) -> dict[int, Pixels]:
        """These frames, by number; numbers beyond the video are left out.

        Raises:
            VideoError: as :meth:`frames`.
        """
        wanted = set(numbers)
        found: dict[int, Pixels] = {}
        if not wanted:
            return found
        for number, frame in enumerate(self.frames()):
            if number in wanted:
                found[number] = frame
            if number >= max(wanted):
                break
        return found


def read_video(path: str | Path) -> tuple[Frames, float]:
    """All frames ``[T, H, W, 3]`` float32 in [0, 1], and frames per second: 14 GB for 30 s of 832x480.

    Raises:
        VideoError: no such file, not a video, or no frame in it.
    """
    file = VideoFile.of(path)
    return as_frames(np.stack(list(file.frames()))), file.fps


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container of a file, and its first video stream.

    Raises:
        VideoError: there is none, or it cannot be read.
    """
    av = require("av", "metrics")
    if not path.is_file():
        raise VideoError(f"no such video: {path}; give the path of a file")
    try:
        with av.open(str(path)) as container:
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, IndexError, ValueError) as failure:
        raise unreadable(path, failure) from failure


def unreadable(path: Path, failure: Exception) -> VideoError:
    """What to raise where a file is no video that PyAV reads."""
    none = "it has no video stream" if isinstance(failure, IndexError) else ""
    reason = none or getattr(failure, "strerror", None) or str(failure) or type(failure).__name__
    return VideoError(f"{path} cannot be read as a video: {reason}.\nGive one that ffmpeg plays.")
