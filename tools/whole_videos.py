"""What whole videos cost at Self-Forcing's width: unpatched, with forced triggers, under CommitWindow.

``python tools/whole_videos.py`` makes videos of 21 frames, 3 to a chunk, with two of its layers (12 heads of 128),
random weights and, as all 1,560 tokens a frame take a CPU some ten minutes per video, as many as ``--grid`` says.
Each chunk is timed; arms take turns, chunk by chunk in one process, so that all meet the same machine. Before the clock
counts each arm makes a video without products of matrices, in which the first prune of a patch is proved, and another
one of which the peak memory is taken. Times are CPU time of one thread; run it with the two variables that growth.py
names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks.experiments.bench.memory import Alive
from tokentrim_hooks.reference import model as reference
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.testing.policies import ForcedPolicy

WINDOW, FRAMES, STEPS = 21, 3, (1000, 750, 500, 250, 0)
GRID = (15, 26)
SHARES = (0.1, 0.3)
"""Of the tokens, pruned by a forced trigger."""


def arms(chunks: int, at: int) -> dict[str, list[tokentrim.Policy]]:
    """Policies by arm; the trigger that is forced once is that of chunk ``at``."""
    once: dict[str, list[tokentrim.Policy]] = {_once(share): [ForcedPolicy({at: share})] for share in SHARES}
    return {
        "unpatched": [],
        **once,
        "10 % in each chunk": [ForcedPolicy(dict.fromkeys(range(1, chunks), SHARES[0]))],
        "CommitWindow(6)": [tokentrim.CommitWindow(6)],
        "unpatched again": [],
    }


def _once(share: float) -> str:
    return f"{100 * share:.0f} % once"


@contextmanager
def nothing_multiplied() -> Iterator[None]:
    """Products of matrices are zeros, attention is its query: what is left of a video's time is little."""

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], layer.out_features)

    with (
        mock.patch.object(reference, "_dot_product", lambda q, k, v: q),
        mock.patch.object(nn.Linear, "forward", linear),
    ):
        yield


class Arm:
    """A model of its own under some policies; one video after the other in one cache."""

    def __init__(self, make: Callable[[], ReferencePipeline], policies: list[tokentrim.Policy], chunks: int) -> None:
        pipeline = make()
        self.pipeline, self.generator, self.chunks = pipeline, pipeline.generator, chunks
        model = pipeline.generator.model
        self.grid, self.dtype = model.grid, next(model.parameters()).dtype
        shape = (1, WINDOW * self.grid[0] * self.grid[1], model.num_heads, model.head_dim)
        self.cache: list[dict[str, Any]] = [
            {name: torch.zeros(shape, dtype=self.dtype) for name in "kv"} for _ in range(model.num_layers)
        ]
        self.handle = tokentrim.patch(pipeline, policies) if policies else None
        with nothing_multiplied():
            for _ in self.video():  # Proves the first prune, which a patch does once.
                pass
            with Alive() as alive:
                for _ in self.video():
                    pass
        own = sum(int(rows.nbytes) for layer in self.cache for rows in (layer["k"], layer["v"]))
        self.peak = alive.peak + own

    def video(self) -> Iterator[float]:
        """CPU seconds of each chunk, one after the other."""
        rng, (height, width) = torch.Generator().manual_seed(1), self.grid
        for layer in self.cache:
            layer |= {name: torch.zeros(1, dtype=torch.long) for name in ("global_end_index", "local_end_index")}
        for chunk in range(self.chunks):
            noise = torch.randn(1, FRAMES, 3, 4 * height, 4 * width, generator=rng).to(self.dtype)
            began, latents = time.process_time(), noise
            for number, step in enumerate(STEPS):
                timestep, start = torch.full((1, FRAMES), step), chunk * FRAMES * height * width
                with torch.no_grad():
                    x0 = self.generator(latents, None, timestep, kv_cache=self.cache, current_start=start)[1]
                latents = x0 if number == len(STEPS) - 2 else noise
            yield time.process_time() - began

    @property
    def records(self) -> list[Any]:
        """So far, of all videos."""
        return [] if self.handle is None else [*self.handle.report]

    @property
    def triggers(self) -> int:
        """Prunes so far, in all videos."""
        return sum(record.pruned for record in self.records)


def measure(options: argparse.Namespace, dtype: str, note: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Seconds by arm and chunk, and the peaks; ``note`` is told after each chunk."""

    def make() -> ReferencePipeline:
        torch.manual_seed(0)
        size = {"layers": options.layers, "dim": 1536, "heads": 12, "grid": tuple(options.grid)}
        return ReferencePipeline.random(local_attn_size=WINDOW, dtype=getattr(torch, dtype), **size)

    made = {name: Arm(make, policies, options.chunks) for name, policies in arms(options.chunks, options.at).items()}
    before = {name: arm.triggers for name, arm in made.items()}
    found: dict[str, Any] = {
        "seconds": {name: [] for name in made}, "peaks": {name: arm.peak for name, arm in made.items()}
    }  # fmt: skip
    for _ in range(options.videos):
        videos = {name: arm.video() for name, arm in made.items()}
        for chunk in range(options.chunks):
            for name in [*made][:: -1 if chunk % 2 else 1]:
                found["seconds"][name].append(next(videos[name]))
                print(dtype, chunk, name, f"{found['seconds'][name][-1]:.3f} s", flush=True)
            note(found)
    found["triggers"] = {name: arm.triggers - before[name] for name, arm in made.items()}
    return found


def breaks_even(ratios: dict[float, float]) -> float | None:
    """The share of tokens from which a prune costs nothing, on the straight line through the shares measured."""
    (low, first), (high, second) = sorted(ratios.items())
    slope = (second - first) / (high - low)
    share = low + (1 - first) / slope if slope < 0 else -1.0
    return share if 0 < share < 1 else None


def show(dtype: str, found: dict[str, Any]) -> None:
    """One line for each arm: over the mean of both unpatched arms, in all and by chunk, and the peak."""
    seconds, peaks = found["seconds"], found["peaks"]
    base = [statistics.fmean(pair) for pair in zip(seconds["unpatched"], seconds["unpatched again"], strict=True)]
    ratios = {arm: sum(times) / sum(base) for arm, times in seconds.items()}
    for arm, times in seconds.items():
        chunks = " ".join(f"{a / b:.2f}" for a, b in zip(times, base, strict=True))
        more = (peaks[arm] - peaks["unpatched"]) / 2**20
        print(f"{dtype} {arm}: {sum(times):.1f} s, x {ratios[arm]:.3f} (by chunk {chunks}); {found['triggers'][arm]} "
              f"triggers; peak with the cache {peaks[arm] / 2**20:.0f} MiB ({more:+.0f})")  # fmt: skip
    share = breaks_even({share: ratios[_once(share)] for share in SHARES})
    print(f"{dtype}: one prune breaks even {'at no share' if share is None else f'at {share:.1%} of the tokens'}")


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    everything: dict[str, Any] = {}

    def note(found: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(everything | {name: found}))

    for name in options.dtype:
        everything[name] = measure(options, name, note)
        show(name, everything[name])
    if options.json:
        options.json.write_text(json.dumps(everything))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--grid", type=int, nargs=2, default=GRID, help="Tokens of a frame, height and width.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=7, help="Of a video; with 7 the window is full.")
    parser.add_argument("--videos", type=int, default=1, help="That each arm makes.")
    parser.add_argument("--at", type=int, default=3, help="The chunk of the one trigger.")
    parser.add_argument("--json", type=Path, help="Written after each chunk.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options)
