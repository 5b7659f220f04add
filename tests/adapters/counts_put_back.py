"""What a model that acts by the number of its calls must equal: one that acts by which of the sampler's calls it is.

The second kind looks the number up by a call's frames and timestep. It counts nothing, so a repeated call has the
number of the one that it repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_reference as tiny
import torch
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

TWICE = ForcedPolicy({2: [0, 3], 3: [1]}, max_regenerations=2)
"""Two chunks are made again, the second of them with a row dead before."""


class Looked:
    """The number of the running call of a denoiser, from 1 on; a function that answers it."""

    def __init__(self, denoiser: Any) -> None:
        self._numbers: dict[tuple[int, float], int] = {}
        self._n = 0
        denoiser.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        level = kwargs["timestep"] if "timestep" in kwargs else args[2]
        call = int(kwargs["current_start"]), float(level.flatten()[0])
        self._n = self._numbers.setdefault(call, len(self._numbers) + 1)

    def __call__(self) -> int:
        return self._n


def pruned(pipeline: Any, **options: Any) -> tuple[Tensor, Any]:
    """A video with two chunks made again, and the report."""
    with tokentrim.patched(pipeline, TWICE, **options) as handle:
        video = tiny.run(pipeline)
    return video, handle.report


def same_as_looked_up(place: Callable[[Any, Callable[[], int]], None], count: Callable[[], int], **options: Any) -> Any:
    """``place(denoiser, number)`` acts by a number; by one that is counted it must make the video of the looked up one.

    Returns:
        The pipeline that counts.
    """
    looked, counting = tiny.make(), tiny.make()
    place(looked.generator, Looked(looked.generator))
    place(counting.generator, count)
    right, report = pruned(looked, **options)
    video, found = pruned(counting, **options)
    assert torch.equal(video, right)
    assert found.triggers == report.triggers == 2
    return counting
