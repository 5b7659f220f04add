"""Frames as all measures take them: RGB, float32 in [0, 1]; a whole video at once, or one frame after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tokentrim_hooks.errors import VideoError

Array = npt.NDArray[np.float64]
Frames = npt.NDArray[np.float32]


def as_frames(video: npt.NDArray[Any] | Tensor) -> Frames:
    """Return ``[T, H, W, 3]`` float32 in [0, 1] from that, from uint8, or from a tensor ``[T, 3, H, W]``.

    Raises:
        VideoError: another shape, no frame, or values that are not finite.
    """
    array = video.detach().cpu().permute(0, 2, 3, 1).numpy() if isinstance(video, Tensor) else np.asarray(video)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise VideoError(f"frames must be [T, H, W, 3], got shape {array.shape}")
    if not len(array):
        raise VideoError("the video has no frame; give one that plays")
    return _in_range(array)


def one_by_one(frames: Iterable[npt.NDArray[Any]]) -> Iterator[Frames]:
    """Each frame ``[H, W, 3]``, uint8 or float, as float32 in [0, 1]; holds none of those that were handed on.

    Raises:
        VideoError: a frame of another shape than the first, or with values that are not finite.
    """
    shape: tuple[int, ...] = ()
    for frame in frames:
        shape = shape or frame.shape
        if frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
            raise VideoError(f"a frame must be [H, W, 3], got shape {frame.shape}")
        if frame.shape != shape:
            sizes = " and ".join(f"{s[1]}x{s[0]}" for s in (shape, frame.shape))
            raise VideoError(f"the video changes its size: {sizes}.\nScale it to one size first.")
        yield _in_range(frame)


def _in_range(array: npt.NDArray[Any]) -> Frames:
    if array.dtype == np.uint8:
        scaled: Frames = np.divide(np.ascontiguousarray(array), np.float32(255), dtype=np.float32)
        return scaled
    scaled = array.astype(np.float32)
    if not np.isfinite(scaled).all():
        raise VideoError("the video holds NaN or inf; give one of finite values")
    return np.ascontiguousarray(np.clip(scaled, 0, 1))
