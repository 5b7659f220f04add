"""What whole videos cost at Self-Forcing's width: unpatched, observing, with forced triggers, under CommitWindow.

``python tools/whole_videos.py`` makes videos of 21 frames, 3 to a chunk, with two of its layers (12 heads of 128) and
random weights; ``--model fastvideo`` takes FastVideo's transformer. All 1,560 tokens a frame take a CPU ten minutes per
video, so that ``--grid``, ``--layers``, ``--calls`` and ``--timed`` make it less. Each call is timed; arms take turns,
chunk by chunk in one process, so that all meet the same machine. Before the clock counts each arm makes a video without
products of matrices, in which the first prune of a patch is proved, and another one of which the peak memory is taken.
With ``--log`` each chunk of an arm is a line of a file, and a run that was broken off goes on where it stopped: what
was timed before goes without products. Times are CPU time of one thread; run it with the two variables that growth.py
names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from whole_models import MODELS, STEPS, Model, nothing_multiplied

import tokentrim_hooks as tokentrim
from tokentrim_hooks.experiments.bench.memory import Alive
from tokentrim_hooks.testing.policies import ForcedPolicy

GRID = (30, 52)
UNPATCHED, AGAIN, EACH = "unpatched", "unpatched again", "10 % in each chunk"
SHARES = (0.1, 0.3)
"""Of the tokens, pruned by a forced trigger."""


def arms(chunks: int, at: int) -> dict[str, list[tokentrim.Policy]]:
    """Policies by arm; the trigger that is forced once is that of chunk ``at``."""
    once: dict[str, list[tokentrim.Policy]] = {_once(share): [ForcedPolicy({at: share})] for share in SHARES}
    return {
        UNPATCHED: [],
        "observing": [tokentrim.ObservePolicy()],
        **once,
        EACH: [ForcedPolicy(dict.fromkeys(range(1, chunks), SHARES[0]))],
        "CommitWindow(6)": [tokentrim.CommitWindow(6)],
        AGAIN: [],
    }


def _once(share: float) -> str:
    return f"{100 * share:.0f} % once"


class Arm:
    """A model of its own under some policies; one video after the other."""

    def __init__(
        self,
        model: Model,
        policies: list[tokentrim.Policy],
        chunks: int,
        steps: Sequence[int] = STEPS,
    ) -> None:
        self.model, self.chunks, self.steps = model, chunks, steps
        self.handle = tokentrim.patch(model.target, policies) if policies else None
        if policies:
            self._play()  # Proves the first prune, which a patch does once.

    def _play(self) -> None:
        with nothing_multiplied():
            for _ in self.video():
                pass

    def peak(self) -> int:
        """Bytes of tensors alive at once in a video, the cache included."""
        with Alive() as alive:
            self._play()
        found: int = alive.peak
        return found + self.model.kept

    def video(self) -> Iterator[list[float]]:
        """CPU seconds of each call of a chunk, one chunk after the other."""
        rng = torch.Generator().manual_seed(1)
        self.model.begin()
        for chunk in range(self.chunks):
            latents = noise = self.model.noise(rng)
            seconds = []
            for number, step in enumerate(self.steps):
                began = time.process_time()
                with torch.no_grad():
                    x0 = self.model.call(latents, number, step, chunk)
                seconds.append(time.process_time() - began)
                latents = x0 if number == len(self.steps) - 2 else noise
            yield seconds

    @property
    def records(self) -> list[Any]:
        """So far, of all videos."""
        return [] if self.handle is None else [*self.handle.report]

    @property
    def triggers(self) -> int:
        """Prunes so far, in all videos."""
        return sum(record.pruned for record in self.records)


class Log:
    """Rows of what was measured, in a file if there is one; those of a run that was broken off are there already."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path and path.is_file() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, **row: Any) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        print(row, flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def find(self, **like: Any) -> dict[str, Any] | None:
        """The latest row with these values."""
        found = [row for row in self.rows if all(row.get(key) == value for key, value in like.items())]
        return found[-1] if found else None


def measure(options: argparse.Namespace, dtype: str, log: Log) -> None:
    """Into the log: the peak of each arm, the seconds of each call, the triggers of the video that was timed."""
    size = (options.layers, tuple(options.grid), getattr(torch, dtype))
    policies = arms(options.chunks, options.at)
    names, steps = chosen(options), (*STEPS[: options.calls - 1], STEPS[-1])
    made = {name: Arm(MODELS[options.model](*size), policies[name], options.chunks, steps) for name in names}
    for name, arm in made.items():
        if not any("peak" in row and (row["dtype"], row["arm"]) == (dtype, name) for row in log.rows):
            log.add(dtype=dtype, arm=name, peak=arm.peak())
    before, videos = {name: arm.triggers for name, arm in made.items()}, {n: a.video() for n, a in made.items()}
    for chunk in range(options.chunks):
        for name in names[:: -1 if chunk % 2 else 1]:
            known = log.find(dtype=dtype, arm=name, chunk=chunk)
            if chunk in options.timed and known is None:
                log.add(dtype=dtype, arm=name, chunk=chunk, seconds=next(videos[name]))
            else:
                with nothing_multiplied():
                    next(videos[name])
    for name, arm in made.items():
        log.add(dtype=dtype, arm=name, triggers=arm.triggers - before[name])


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the arms, both unpatched ones at the ends."""
    names = [*arms(options.chunks, options.at)]
    return [name for name in names if not options.arms or name in options.arms or name in (UNPATCHED, AGAIN)]


def breaks_even(ratios: dict[float, float]) -> float | None:
    """The share of tokens from which a prune costs nothing, on the straight line through the shares measured."""
    (low, first), (high, second) = sorted(ratios.items())
    slope = (second - first) / (high - low)
    share = low + (1 - first) / slope if slope < 0 else -1.0
    return share if 0 < share < 1 else None


def chunk_seconds(options: argparse.Namespace, dtype: str, log: Log, of: int) -> dict[str, list[float]]:
    """By arm, of each chunk that was timed; had it ``of`` calls, the further ones noisy and not judged.

    Such a call is as the chunk's first one, which is judged, and that takes milliseconds. Where the first one was
    replayed, it is as the second: made behind the prune, too (with two calls that is the commit, which reads as much).
    """
    names = chosen(options)
    found = {(arm, chunk): log.find(dtype=dtype, arm=arm, chunk=chunk) for arm in names for chunk in options.timed}
    calls = {place: row["seconds"] for place, row in found.items() if row is not None}

    def replayed(arm: str, chunk: int) -> bool:
        return chunk > 0 if arm == EACH else chunk == options.at and arm in map(_once, SHARES)

    more = of - options.calls
    return {arm: [sum(calls[arm, n]) + more * calls[arm, n][replayed(arm, n)] for n in options.timed] for arm in names}


def uncertainty(by: dict[str, list[float]]) -> float:
    """Half of a 95 % interval of an arm's ratio, from how far both unpatched arms differ, chunk by chunk."""
    from scipy.stats import t

    pairs = [*zip(by[UNPATCHED], by[AGAIN], strict=True)]
    base = [(a + b) / 2 for a, b in pairs]
    spread = statistics.fmean(((a - b) / c) ** 2 / 2 for (a, b), c in zip(pairs, base, strict=True)) ** 0.5
    weights = [c / sum(base) for c in base]
    # Of the arm's own chunks, and half as much (in squares) of the mean of two that it is compared with.
    return float(t.ppf(0.975, len(base))) * spread * (1.5 * sum(weight**2 for weight in weights)) ** 0.5


def show(options: argparse.Namespace, dtype: str, log: Log, of: int) -> None:
    """One line for each arm: over the mean of both unpatched arms, in all and by chunk, and the peak."""
    by = chunk_seconds(options, dtype, log, of)
    base = [statistics.fmean(pair) for pair in zip(by[UNPATCHED], by[AGAIN], strict=True)]
    ratios = {arm: sum(times) / sum(base) for arm, times in by.items()}
    peaks = {row["arm"]: row["peak"] / 2**20 for row in log.rows if row["dtype"] == dtype and "peak" in row}
    print(f"{dtype}, {of} calls a chunk, {options.calls} timed, chunks {options.timed}; +- {uncertainty(by):.3f}")
    for arm, times in by.items():
        chunks = " ".join(f"{a / b:.3f}" for a, b in zip(times, base, strict=True))
        more = f"{peaks[arm]:.0f} MiB ({peaks[arm] - peaks[UNPATCHED]:+.0f})"
        print(f"  {arm}: {sum(times):.1f} s, x {ratios[arm]:.3f} (by chunk {chunks}); peak with the cache {more}")
    if all(_once(share) in ratios for share in SHARES):
        share = breaks_even({share: ratios[_once(share)] for share in SHARES})
        print(f"  one prune breaks even {'at no share' if share is None else f'at {share:.1%} of the tokens'}")


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    log = Log(options.log)
    for dtype in options.dtype:
        measure(options, dtype, log)
        for of in sorted({options.calls, len(STEPS)}):
            show(options, dtype, log, of)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--model", default="reference", choices=MODELS, help="FastVideo's, or this package's own.")
    parser.add_argument("--grid", type=int, nargs=2, default=GRID, help="Tokens of a frame, height and width.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=7, help="Of a video; with 7 the window is full.")
    parser.add_argument("--calls", type=int, default=len(STEPS), help="Of a chunk, that of the clean frames included.")
    parser.add_argument("--timed", type=int, nargs="+", help="Chunks that are timed; all, if not given.")
    parser.add_argument("--at", type=int, default=3, help="The chunk of the one trigger.")
    parser.add_argument("--arms", nargs="+", help="All, if not given; both unpatched ones always.")
    parser.add_argument("--log", type=Path, help="A line for each chunk of an arm; a run goes on from it.")
    options = parser.parse_args()
    options.timed = options.timed or [*range(options.chunks)]
    torch.set_num_threads(1)
    main(options)
