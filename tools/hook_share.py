"""What our hooks take of a chunk of Self-Forcing's width, both measured in one run: ``python tools/hook_share.py``.

The model computes, and so empties the caches that our Python is run from. The chunks before the one that is measured go
without products of matrices. Times are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from whole_models import FRAMES, STEPS, OfReference, nothing_multiplied
from whole_videos import Arm

import tokentrim_hooks as tokentrim


class Stamps:
    """CPU time around the denoiser's calls and inside of our hooks, which are the first and the last there."""

    def __init__(self, model: OfReference) -> None:
        self.ours, self._since = 0.0, 0.0
        denoiser = model.denoiser
        denoiser.register_forward_pre_hook(self._stop)
        denoiser.register_forward_hook(self._start)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._start()
            output = denoiser(*args, **kwargs)
            self._stop()
            return output

        model.denoiser = call  # no method, for an object that holds the denoiser is taken for another sampler

    def _start(self, *_: Any) -> None:
        self._since = time.thread_time()

    def _stop(self, *_: Any) -> None:
        self.ours += time.thread_time() - self._since


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    model = OfReference(options.layers, tuple(options.grid), torch.float32)
    arm = Arm(model, [tokentrim.ObservePolicy()], options.chunk + 1)
    stamps, video, before = Stamps(model), arm.video(), len(arm.records)
    with nothing_multiplied():
        for _ in range(options.chunk):
            next(video)
    stamps.ours = 0.0
    whole, hooks, tokens = sum(next(video)), stamps.ours, options.grid[0] * options.grid[1]
    judged = arm.records[before:][-1].severity
    assert judged is not None, "the chunk was judged"
    print(f"{options.layers} layers, {FRAMES} frames of {tokens} tokens behind {options.chunk * FRAMES}")
    print(f"{len(STEPS)} calls: {whole:.2f} s, {1000 * hooks:.2f} ms of it our hooks': x {whole / (whole - hooks):.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=2, default=(30, 52), help="Tokens of a frame, height and width.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=1, help="Ordinal of the chunk that is measured.")
    torch.set_num_threads(1)
    main(parser.parse_args())
