"""What whole videos cost at Self-Forcing's width: unpatched, observing, with forced triggers, under CommitWindow.

``python tools/whole_videos.py`` makes short videos with two of its layers (12 heads of 128), random weights and fewer
tokens a frame, for at all 1,560 a video takes hours on a CPU. Each chunk is timed; arms take turns, chunk by chunk in
one process, so that all meet the same machine. Times are CPU time of one thread; run it with the two variables that
growth.py names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.testing.policies import ForcedPolicy

WINDOW, FRAMES, STEPS = 21, 3, (1000, 750, 500, 250, 0)
GRID = (15, 26)
SHARE = 0.1
"""Of the tokens, pruned by a forced trigger."""


def arms(chunks: int, at: int) -> dict[str, list[tokentrim.Policy]]:
    """Policies by arm; the trigger that is forced is that of chunk ``at``."""
    return {
        "unpatched": [],
        "observing": [tokentrim.ObservePolicy()],
        "10 % pruned once": [ForcedPolicy({at: SHARE})],
        "10 % pruned in each chunk": [ForcedPolicy(dict.fromkeys(range(1, chunks), SHARE))],
        "CommitWindow(6)": [tokentrim.CommitWindow(6)],
        "unpatched again": [],
    }


@torch.no_grad()
def video(dtype: torch.dtype, grid: tuple[int, int], layers: int, policies: list[tokentrim.Policy]) -> Iterator[float]:
    """CPU seconds of each chunk, one after the other, for as long as somebody asks."""
    torch.manual_seed(0)
    pipeline = ReferencePipeline.random(
        layers=layers, dim=1536, heads=12, grid=grid, local_attn_size=WINDOW, dtype=dtype
    )
    generator, model = pipeline.generator, pipeline.generator.model
    rows, rng = WINDOW * grid[0] * grid[1], torch.Generator().manual_seed(1)
    cache: list[dict[str, Any]] = [
        {name: torch.zeros(1, rows, model.num_heads, model.head_dim, dtype=dtype) for name in "kv"}
        | {name: torch.zeros(1, dtype=torch.long) for name in ("global_end_index", "local_end_index")}
        for _ in range(layers)
    ]
    handle = tokentrim.patch(pipeline, policies) if policies else None
    chunk = 0
    while True:
        noise = torch.randn(1, FRAMES, 3, 4 * grid[0], 4 * grid[1], generator=rng).to(dtype)
        began, latents = time.process_time(), noise
        for number, step in enumerate(STEPS):
            timestep = torch.full((1, FRAMES), step)
            start = chunk * FRAMES * grid[0] * grid[1]
            x0 = generator(latents, None, timestep, kv_cache=cache, current_start=start)[1]
            latents = x0 if number == len(STEPS) - 2 else noise
        chunk += 1
        yield time.process_time() - began
        if handle is not None:
            assert handle.report


def measure(dtype: torch.dtype, grid: tuple[int, int], layers: int, chunks: int, at: int) -> dict[str, list[float]]:
    """Seconds by arm and chunk."""
    made = arms(chunks, at)
    videos = {name: video(dtype, grid, layers, policies) for name, policies in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for chunk in range(chunks):
        for name in [*made][:: -1 if chunk % 2 else 1]:
            times[name].append(next(videos[name]))
            print(dtype, chunk, name, f"{times[name][-1]:.3f} s", flush=True)
    return times


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    found = {}
    for name in options.dtype:
        times = measure(getattr(torch, name), tuple(options.grid), options.layers, options.chunks, options.at)
        found[name] = times
        whole = statistics.fmean([sum(times["unpatched"]), sum(times["unpatched again"])])
        for arm, seconds in times.items():
            print(f"{name} {arm}: {sum(seconds):.1f} s, x {sum(seconds) / whole:.3f}")
        if options.json:
            options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--grid", type=int, nargs=2, default=GRID, help="Tokens of a frame, height and width.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--at", type=int, default=3, help="The chunk of the one trigger.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options)
