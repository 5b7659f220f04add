"""Reading videos, with PyAV."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.extras import require
from tokentrim_hooks.metrics.metrics import Frames, as_frames


def read_video(path: str | Path) -> tuple[Frames, float]:
    """All frames ``[T, H, W, 3]`` float32 in [0, 1], and frames per second.

    Raises:
        VideoError: no such file, not a video, or no frame in it.
    """
    av = require("av", "metrics")
    if not Path(path).is_file():
        raise VideoError(f"no such video: {path}")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 16)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except (av.error.FFmpegError, IndexError, ValueError) as failure:
        raise VideoError(f"{path} cannot be read as a video: {failure}") from failure
    if not frames:
        raise VideoError(f"{path} holds no frame")
    return as_frames(np.stack(frames)), fps
