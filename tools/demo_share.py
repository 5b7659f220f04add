"""What the demo's regenerations cost, against its share of flagged videos: ``python tools/demo_share.py``.

The batches of ``tokentrim demo`` under the paper's policy beside the same unpatched and observed, all rolled out in
turns in one process; CPU time of one thread, medians and ranges of the rounds. The first prune of each patch is proved
in a rollout before the clock counts. "By calls" is what the patched batch would take if nothing cost but the calls
that flagged videos make again, each its share of the batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
from tokentrim_hooks.experiments.demo.acts import ACTS, PAPER, Size

UNPATCHED, AGAIN, OBSERVING, PATCHED = "unpatched", "unpatched again", "observing", "the paper's policy"


class Arm:
    """A model of its own, which rolls out one batch again and again."""

    def __init__(self, size: Size, kind: str, fault: Any, policies: Sequence[tokentrim.Policy]) -> None:
        seeds = range(size.seed, size.seed + size.scenes)
        chunks = size.fault_chunks if fault else size.chunks
        maker = ReferenceMaker.load(chunks=chunks, fault=fault, sink=None, trained=True, device="cpu", kind=kind)
        self.trial = maker(seeds)
        self.handle = tokentrim.patch(self.trial.model, [*policies], probe=PAPER.probe) if policies else None
        self.roll_out()
        self.known = 0 if self.handle is None else len(self.handle.report)

    def roll_out(self) -> float:
        """CPU seconds of the batch."""
        began = time.thread_time()
        with torch.no_grad():
            self.trial.run()
        return time.thread_time() - began

    @property
    def records(self) -> list[Any]:
        """Of the rollouts that were timed."""
        return [] if self.handle is None else [*self.handle.report][self.known :]


def flagged(records: Sequence[Any]) -> tuple[float, float, float]:
    """Shares: of videos flagged in a chunk, of chunks with one or more, and of its calls that a video makes again."""
    own = [sum(r.phases.values()) for r in records]
    pruned = [r for r in records if r.pruned]
    chunks = {(r.video, r.chunk) for r in records}
    again = sum(r.extra_calls for r in pruned)
    return len(pruned) / len(records), len({(r.video, r.chunk) for r in pruned}) / len(chunks), again / sum(own)


def measure(size: Size, act: tuple[Any, ...], rounds: int) -> None:
    """Print one act of the demo."""
    _, title, kind, fault, _ = act
    policies = {UNPATCHED: [], OBSERVING: [tokentrim.ObservePolicy()], PATCHED: PAPER.policies(size.seed), AGAIN: []}
    arms = {name: Arm(size, kind, fault, found) for name, found in policies.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in [*arms][:: -1 if turn % 2 else 1]:
            times[name].append(arms[name].roll_out())
    videos, chunks, calls = flagged(arms[PATCHED].records)
    print(f"{title}: {videos:.1%} of videos' chunks flagged, in {chunks:.0%} of chunks; by calls x {1 + calls:.3f}")
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times[UNPATCHED], strict=True)]
        shown = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"  {name}: {statistics.median(found):.2f} s, x {shown}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scenes", type=int, default=Size().scenes)
    parser.add_argument("--chunks", type=int, default=Size().chunks)
    parser.add_argument("--acts", nargs="+", choices=[name for name, *_ in ACTS], help="All, if not given.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for act in ACTS:
        if not options.acts or act[0] in options.acts:
            measure(Size(scenes=options.scenes, chunks=options.chunks), act, options.rounds)
