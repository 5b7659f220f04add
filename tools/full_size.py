"""What a denoiser call costs at Self-Forcing's own shapes, by the share of tokens that is dead: time and peak memory.

``python tools/full_size.py`` measures two of its layers (12 heads of 128, 1,560 tokens a frame, 21 frames in the
window, 3 in a chunk) with random weights: single calls, for a whole video takes hours on a CPU. The window is full from
the beginning; calls that are not measured go without their products of matrices. Times are CPU time of one thread, all
arms in turns in one process; run it as ``MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=8000000000 python
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
from unittest import mock

import torch
from torch import Tensor, nn

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


class Kernels:
    """The model's products of matrices, attention's among them, which are only made while they are ``on``."""

    def __init__(self) -> None:
        self.on = False
        self._attend, self._multiply = reference._dot_product, nn.Linear.forward

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the model's own; ``q`` while they are off."""
        return self._attend(q, k, v) if self.on else q

    def linear(self) -> Callable[[nn.Linear, Tensor], Tensor]:
        """In the place of ``Linear.forward``; zeros while they are off."""

        def forward(layer: nn.Linear, x: Tensor) -> Tensor:
            return self._multiply(layer, x) if self.on else x.new_zeros(*x.shape[:-1], layer.out_features)

        return forward

    @contextmanager
    def switched(self) -> Iterator[None]:
        """While these stand in for the model's own."""
        places = (
            mock.patch.object(reference, "_dot_product", self.attend),
            mock.patch.object(nn.Linear, "forward", self.linear()),
        )
        with places[0], places[1]:
            yield


class Video:
    """A video whose window is full, call by call. Its cache is made once, and serves one video after the other."""

    def __init__(self, pipeline: ReferencePipeline, dtype: torch.dtype) -> None:
        self.generator, self.frame = pipeline.generator, pipeline.frame_seq_length
        model, rng = pipeline.generator.model, torch.Generator().manual_seed(0)
        self.rows, self.chunk = WINDOW * self.frame, 0
        shape = (1, self.rows, model.num_heads, model.head_dim)
        self.cache: list[dict[str, Tensor]] = [
            {name: torch.randn(shape, generator=rng).to(dtype) for name in "kv"} for _ in range(model.num_layers)
        ]
        height, width = model.grid
        self.noise = torch.randn(2, 1, FRAMES, 3, 4 * height, 4 * width, generator=rng).to(dtype)

    def begin(self) -> None:
        """Another video in the same cache."""
        self.chunk = 0
        for layer in self.cache:
            layer |= {name: torch.tensor([self.rows]) for name in ("global_end_index", "local_end_index")}

    def call(self, step: int, latents: Tensor | None = None) -> Tensor:
        """One denoiser call of the chunk in progress; x0."""
        start = self.rows + self.chunk * FRAMES * self.frame
        given = self.noise[self.chunk] if latents is None else latents
        timestep = torch.full((1, FRAMES), step)
        answer: Tensor = self.generator(given, None, timestep, kv_cache=self.cache, current_start=start)[1]
        return answer

    def finish(self, x0: Tensor) -> None:
        """The commit of the chunk in progress."""
        self.call(0, x0)
        self.chunk += 1

    @property
    def bytes(self) -> int:
        """Of the cache."""
        return sum(int(tensor.nbytes) for layer in self.cache for tensor in layer.values())


def arms() -> dict[str, tuple[list[tokentrim.Policy], bool]]:
    """Policies by arm, and whether it is the commit that is measured, not the call behind the prune."""
    dead = {f"{share:.0%} dead": ([ForcedPolicy({1: share})], False) for share in SHARES}
    window = {f"CommitWindow({COMMITS}), commit": ([tokentrim.CommitWindow(COMMITS)], True)}
    return {"unpatched": ([], False), **dead, **window, "unpatched again": ([], False)}


@torch.no_grad()
def cost(video: Video, arm: str, kernels: Kernels, peak: bool = False) -> float:
    """CPU seconds of one call of an arm; or the peak of the bytes that it makes, which needs no kernels."""
    policies, of_commit = arms()[arm]
    video.begin()
    with tokentrim.patched(video.generator, policies) if policies else nullcontext() as handle:
        x0 = video.call(1000)
        if not of_commit:
            video.finish(x0)
            video.call(1000)
        # Behind a prune the first call has been made again; this one is like all that follow.
        given = (0, x0) if of_commit else (500, video.noise[video.chunk] + 0)
        if peak:
            with Alive() as alive:
                video.call(*given)
            return float(alive.peak)
        kernels.on, began = True, time.process_time()
        video.call(*given)
        seconds, kernels.on = time.process_time() - began, False
    assert handle is None or handle.report.triggers == arm.endswith("dead"), handle.report.summary()
    return seconds


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


def main(dtype: torch.dtype, rounds: int, small: bool, file: Path | None) -> None:
    """Measure and print."""
    pipeline = ReferencePipeline.random(local_attn_size=WINDOW, dtype=dtype, **(SMALL if small else FULL))
    video, kernels, names = Video(pipeline, dtype), Kernels(), list(arms())
    with kernels.switched():
        peaks = {arm: cost(video, arm, kernels, peak=True) for arm in names}
        times: dict[str, list[float]] = {arm: [] for arm in names}
        for turn in range(rounds):
            for arm in names[:: -1 if turn % 2 else 1]:
                times[arm].append(cost(video, arm, kernels))
                print(turn, arm, f"{times[arm][-1]:.2f} s", flush=True)
            if file:
                file.write_text(json.dumps({"times": times, "peaks": peaks, "cache": video.bytes}))
    # Of the two unpatched calls in a round, the mean: they differ by more than anything else here.
    base = [statistics.fmean(pair) for pair in zip(times["unpatched"], times["unpatched again"], strict=True)]
    ratios = {arm: [a / b for a, b in zip(found, base, strict=True)] for arm, found in times.items()}
    for arm, found in ratios.items():
        ends, whole = f"{min(found):.3f} to {max(found):.3f}", (peaks[arm] + video.bytes) / 2**20
        more = (peaks[arm] - peaks["unpatched"]) / 2**20
        print(f"{arm}: {statistics.median(times[arm]):.2f} s, x {statistics.median(found):.3f} ({ends}); "
              f"peak with the cache {whole:.0f} MiB ({more:+.0f})")  # fmt: skip
    fixed, slope, share = whole_video({share: statistics.median(ratios[f"{share:.0%} dead"]) for share in SHARES})
    even = "at no share" if share is None else f"at {share:.1%} of the tokens"
    print(f"a call with dead tokens: {fixed:+.3f}, and {slope:+.3f} for all keys; a trigger breaks even {even}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="A size that takes a second.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(getattr(torch, options.dtype), options.rounds, options.small, options.json)
