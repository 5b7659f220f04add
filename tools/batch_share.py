"""What a prune in each chunk costs a batch of 8, of one sample or of all: ``python tools/batch_share.py``.

A small reference model; videos of all arms take turns, CPU time of one thread, medians and ranges of seven rounds. The
first prune of each patch is proved before the clock counts.
"""

from __future__ import annotations

import statistics
import time

import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.testing.policies import ForcedPolicy

BATCH, CHUNKS, ROUNDS = 8, 6, 7
AT = dict.fromkeys(range(1, CHUNKS), 0.1)
ARMS: dict[str, tokentrim.Policy | None] = {
    "unpatched": None,
    "observing": tokentrim.ObservePolicy(),
    "one of 8 in each chunk": ForcedPolicy(AT, samples=(0,)),
    "all 8 in each chunk": ForcedPolicy(AT),
}


def pipeline(policy: tokentrim.Policy | None) -> ReferencePipeline:
    """A model of its own, patched if there is a policy."""
    torch.manual_seed(0)
    made = ReferencePipeline.random(layers=4, dim=128, heads=4, grid=(8, 8), local_attn_size=21)
    if policy is not None:
        tokentrim.patch(made, policy)
    return made


def seconds(made: ReferencePipeline) -> float:
    """Of one video."""
    noise = torch.randn(BATCH, 3 * CHUNKS, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    began = time.process_time()
    made.inference(noise, ["a"] * BATCH, return_latents=True)
    return time.process_time() - began


def main() -> None:
    """Measure and print."""
    made = {name: pipeline(policy) for name, policy in ARMS.items()}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(-1, ROUNDS):
        for name in [*ARMS][:: -1 if turn % 2 else 1]:
            times[name] += [seconds(made[name])][: turn + 1]
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times["unpatched"], strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{name}: {statistics.median(found):.3f} s, x {middle:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
