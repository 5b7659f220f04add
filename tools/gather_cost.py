"""What gathering live rows costs beside a copy of the same bytes: ``python tools/gather_cost.py``.

One layer's K: 32,760 rows of 12 x 128, and 1,024 tokens of 21 frames of 4 x 16; a tenth of the rows dead, in one piece
or scattered. Three ways: ``index_select`` as the tap does it, a ``clone`` of as many rows, runs of live rows joined.
CPU time of one thread, medians of five turns; run it with the two variables that growth.py names.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHAPES = ((1, 32_760, 12, 128), (1, 21 * 1024, 4, 16))
DEAD = 0.1
TURNS = 5


def live(rows: int, scattered: bool) -> Tensor:
    """The rows that live, ascending."""
    dead = int(DEAD * rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)) if scattered else torch.arange(rows)
    return order[dead:].sort().values


def joined(cache: Tensor, ends: list[tuple[int, int]]) -> Tensor:
    """Live rows as runs of neighbours, one behind the other."""
    return torch.cat([cache[:, first:stop] for first, stop in ends], dim=1)


def runs(index: Tensor) -> list[tuple[int, int]]:
    """First and behind the last of each run of neighbours."""
    cuts = ((index[1:] - index[:-1]) != 1).nonzero().flatten() + 1
    parts = torch.tensor_split(index, cuts)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def measured(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds, all ways in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, TURNS):
        for name, way in ways.items():
            began = time.thread_time()
            way()
            times[name] += [1000 * (time.thread_time() - began)][: turn + 1]
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure and print."""
    for shape in SHAPES:
        cache = torch.ones(shape)
        for scattered in (False, True):
            index = live(shape[1], scattered)
            ends, like = runs(index), cache[:, : len(index)]
            ways: dict[str, Callable[[], Any]] = {
                "index_select": lambda cache=cache, index=index: cache.index_select(1, index),
                "clone": lambda like=like: like.clone(memory_format=torch.contiguous_format),
                "runs joined": lambda cache=cache, ends=ends: joined(cache, ends),
            }
            found = ", ".join(f"{name} {ms:.2f} ms" for name, ms in measured(ways).items())
            print(f"{shape}, {'scattered' if scattered else 'in one piece'}, {len(ends)} runs: {found}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
