"""What a denoiser call costs at Self-Forcing's own shapes, by the share of tokens that is dead: time and peak memory.

``python tools/full_size.py`` measures two of its layers (12 heads of 128, 1,560 tokens a frame, 21 frames in the
window, 3 in a chunk) with random weights: single calls, for a whole video takes hours on a CPU. The window is full from
the beginning; calls that are not measured go without the attention kernel. Times are CPU time of one thread, all arms
in turns in one process; run it as ``MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000 python
tools/full_size.py``, see growth.py. What a whole video costs follows by arithmetic (:func:`whole_video`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.experiments.bench.memory import Alive
from tokentrim_hooks.reference import model as reference
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.testing.policies import ForcedPolicy

FULL = {"layers": 2, "dim": 1536, "heads": 12, "grid": (30, 52)}
SMALL = {"layers": 2, "dim": 64, "heads": 2, "grid": (6, 8)}
"""A size at which this file itself can be tried."""
WINDOW, FRAMES, CALLS = 21, 3, 5
SHARES = (0.1, 0.3, 0.5)
COMMITS = 6
"""Frames that CommitWindow lets a commit read."""


class Kernel:
    """Attention's kernel, which only runs while it is ``on``."""

    def __init__(self) -> None:
        self.on = False
        self._attend = reference._dot_product

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the model's own; ``q`` while it is off."""
        return self._attend(q, k, v) if self.on else q


class Video:
    """A video whose window is full, call by call."""

    def __init__(self, pipeline: ReferencePipeline, dtype: torch.dtype) -> None:
        self.model, self.frame = pipeline.generator.model, pipeline.frame_seq_length
        rows, heads = WINDOW * self.frame, self.model.num_heads
        rng = torch.Generator().manual_seed(0)
        shape = (1, rows, heads, self.model.head_dim)
        self.cache = [
            {name: torch.randn(shape, generator=rng).to(dtype) for name in "kv"}
            | {name: torch.tensor([rows]) for name in ("global_end_index", "local_end_index")}
            for _ in range(self.model.num_layers)
        ]
        height, width = self.model.grid
        self.noise = torch.randn(1, FRAMES, 3, 4 * height, 4 * width, generator=rng).to(dtype)
        self.chunk, self.generator = 0, pipeline.generator

    def call(self, step: int, latents: Tensor | None = None) -> Tensor:
        """One denoiser call of the chunk in progress; x0."""
        start = (WINDOW + self.chunk * FRAMES) * self.frame
        given = self.noise if latents is None else latents
        timestep = torch.full((1, FRAMES), step)
        answer: Tensor = self.generator(given, None, timestep, kv_cache=self.cache, current_start=start)[1]
        return answer

    def finish(self, x0: Tensor) -> None:
        """The commit of the chunk in progress."""
        self.call(0, x0)
        self.chunk += 1


def arms() -> dict[str, tuple[list[tokentrim.Policy], bool]]:
    """Policies by arm, and whether it is the commit that is measured, not the call behind the prune."""
    dead = {f"{share:.0%} dead": ([ForcedPolicy({1: share})], False) for share in SHARES}
    window = {f"CommitWindow({COMMITS}), commit": ([tokentrim.CommitWindow(COMMITS)], True)}
    return {"unpatched": ([], False), "observing": ([tokentrim.ObservePolicy()], False), **dead, **window}


@contextmanager
def measured(kernel: Kernel, take: Callable[[], Any]) -> Iterator[list[float]]:
    """CPU seconds of the block, with the kernel on; or what ``take`` counts of it, without."""
    found: list[float] = []
    counting = take()
    kernel.on = counting is None
    began = time.process_time()
    with counting or nullcontext():
        yield found
    found.append(time.process_time() - began if counting is None else counting.peak)
    kernel.on = False


@torch.no_grad()
def cost(pipeline: ReferencePipeline, arm: str, kernel: Kernel, dtype: torch.dtype, take: Callable[[], Any]) -> float:
    """Of one call of an arm."""
    policies, of_commit = arms()[arm]
    video, generator = Video(pipeline, dtype), pipeline.generator
    with tokentrim.patched(generator, policies) if policies else nullcontext() as handle:
        x0 = video.call(1000)
        if not of_commit:
            video.finish(x0)
            video.call(1000)
        # Behind a prune the first call has been made again; this one is like all that follow.
        with measured(kernel, take) as found:
            video.call(*((0, x0) if of_commit else (500, video.noise + 0)))
    assert handle is None or handle.report.triggers == arm.endswith("dead"), handle.report.summary()
    return found[0]


def whole_video(ratios: dict[float, float]) -> tuple[float, float, float | None]:
    """Of single calls' ratios to unpatched by share: the fixed part, the slope, and the share that breaks even.

    A trigger costs one call. What it kills are the tokens of all 18 frames before the chunk, in the 5 calls that
    follow in this chunk (the repeated one, three, the commit), of 15, 12 ... 3 frames in 5 calls of each later chunk.
    Calls with dead tokens cost ``fixed`` more and ``slope`` less for each share of keys that is dead.
    """
    context = range(WINDOW - FRAMES, 0, -FRAMES)
    dead = {share * context[0] / WINDOW: ratio for share, ratio in ratios.items()}
    x, y = list(dead), [ratio - 1 for ratio in dead.values()]
    mean = statistics.fmean(x)
    slope = sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)
    fixed = statistics.fmean(y) - slope * mean
    # 1 + calls * fixed + slope * share * CALLS * sum(context) / WINDOW = 0
    calls, weight = CALLS * len(context), CALLS * sum(context) / WINDOW
    share = -(1 + calls * fixed) / (slope * weight) if slope < 0 else -1.0
    return fixed, slope, share if 0 < share < 1 else None


def main(dtype: torch.dtype, rounds: int, small: bool) -> dict[str, Any]:
    """Measure and print."""
    kernel = Kernel()
    with mock.patch.object(reference, "_dot_product", kernel):
        pipeline = ReferencePipeline.random(local_attn_size=WINDOW, dtype=dtype, **(SMALL if small else FULL))
        peaks = {arm: cost(pipeline, arm, kernel, dtype, Alive) for arm in arms()}
        times: dict[str, list[float]] = {arm: [] for arm in arms()}
        for turn in range(rounds):
            for arm in list(times)[:: 1 if turn % 2 else -1]:
                times[arm].append(cost(pipeline, arm, kernel, dtype, lambda: None))
                print(turn, arm, f"{times[arm][-1]:.2f} s", flush=True)
    ratios = {arm: [a / b for a, b in zip(found, times["unpatched"], strict=True)] for arm, found in times.items()}
    for arm, found in ratios.items():
        ends = f"{min(found):.3f} to {max(found):.3f}"
        memory = f"peak {peaks[arm] / 2**20:.0f} MiB, x {peaks[arm] / peaks['unpatched']:.3f}"
        print(f"{arm}: {statistics.median(times[arm]):.2f} s, x {statistics.median(found):.3f} ({ends}); {memory}")
    fixed, slope, share = whole_video({share: statistics.median(ratios[f"{share:.0%} dead"]) for share in SHARES})
    even = "at no share" if share is None else f"at {share:.1%} of the tokens"
    print(f"a call with dead tokens: {fixed:+.3f}, and {slope:+.3f} for all keys; a trigger breaks even {even}")
    return {"times": times, "peaks": peaks, "fixed": fixed, "slope": slope, "even": share}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="A size that takes a second.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = main(getattr(torch, options.dtype), options.rounds, options.small)
    if options.json:
        options.json.write_text(json.dumps(results))
