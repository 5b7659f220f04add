"""Writing videos that every browser plays, with PyAV."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.extras import require


def write_video(path: str | Path, frames: Iterable[npt.NDArray[Any]], fps: float = 16.0) -> Path:
    """Write frames as H.264 in an mp4, as they come; returns the path.

    Args:
        path: the file, replaced if it is there.
        frames: each ``[H, W, 3]`` RGB, uint8 or float in [0, 1], of one size; an odd last row or column is left out,
            for H.264 halves the colours' resolution.
        fps: frames per second.

    Raises:
        VideoError: no frame, frames of several sizes, or the file cannot be written.
    """
    av = require("av", "metrics")
    stream: Any = None
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            for frame in map(_bytes, frames):
                if stream is None:
                    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                    stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
                elif frame.shape[:2] != (stream.height, stream.width):
                    raise VideoError(f"cannot write {path}: its frames differ in size; scale them to one.")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if stream is None:
                raise VideoError(f"cannot write {path}: there is no frame; give one at least.")
            container.mux(stream.encode())
    except (av.error.FFmpegError, OSError) as failure:
        raise VideoError(f"cannot write {path}: {failure}.\nGive another place, or see to this one.") from failure
    return Path(path)


def _bytes(frame: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """A frame as bytes, of even height and width."""
    height, width = (size - size % 2 for size in frame.shape[:2])
    part = frame[:height, :width]
    whole = part if part.dtype == np.uint8 else (255 * np.clip(part, 0, 1)).round().astype(np.uint8)
    return np.ascontiguousarray(whole)
