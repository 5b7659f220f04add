"""What a long run and its report need of memory: 2,000 chunks of 1,560 tokens with a log, ``python tools/long_log.py``.

The model is blank, so that what grows is ours. The process's own size is printed along the way, then the size of the
log, then the peak and the CPU time of ``tokentrim report`` on it. Reads ``/proc``, which is Linux.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from hook_path import chunks, constant

import tokentrim_hooks as tokentrim

EVERY = 500
WARM = 50
"""Chunks after which the first size is printed: everything that is loaded late has been."""
REPORT = """
import atexit, runpy, sys
from pathlib import Path
atexit.register(lambda: sys.stderr.write(Path("/proc/self/status").read_text()))
sys.argv = ["tokentrim", "report", sys.argv[1]]
runpy.run_module("tokentrim_hooks", run_name="__main__")
"""
"""Tells its own peak: to its parent a process seems as large as the one that it was forked from."""


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def run(tokens: int, count: int, folder: Path) -> dict[int, float]:
    """The process's size after some chunks of a video."""
    generator, last = constant(tokens), count - 1
    policy, observers = tokentrim.ObservePolicy(), [tokentrim.JsonLines(folder)]
    with tokentrim.patched(generator, policy, observers=observers, adapter="self-forcing"):
        return {n: resident() for n in chunks(generator, count) if n in (WARM, last) or not (n + 1) % EVERY}


def read(folder: Path) -> tuple[float, float]:
    """Peak MiB and CPU seconds of ``tokentrim report`` on a log."""
    command = [sys.executable, "-c", REPORT, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak is not None, "Linux says it"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return int(peak[1]) / 1024, used.ru_utime + used.ru_stime


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    print(f"with torch and this package: {resident():.0f} MiB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for chunk, size in run(options.tokens, options.chunks, folder).items():
            print(f"after chunk {chunk}: {size:.1f} MiB", flush=True)
        print(f"log: {(folder / 'chunks.jsonl').stat().st_size / 2**20:.1f} MiB")
        peak, seconds = read(folder)
        print(f"tokentrim report: {peak:.0f} MiB at its peak, {seconds:.1f} s of CPU")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1560, choices=(64, 1560, 3600, 14400, 32640))
    parser.add_argument("--chunks", type=int, default=2000)
    torch.set_num_threads(1)
    main(parser.parse_args())
