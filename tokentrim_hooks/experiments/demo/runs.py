"""The demo's rollouts: the reference model over drawn scenes, unpatched and patched, same scenes and same noise."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.api import patch
from tokentrim_hooks.reference.fault import Blotch, Planter, Where
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.reference.scenes import Scene, scenes
from tokentrim_hooks.report.record import Report

FRAMES = 3
"""Frames of a chunk of the reference model."""
PLACES: tuple[Where, ...] = ("context", "chunk")
"""Where the fault is planted, see :mod:`tokentrim_hooks.reference.fault`."""


@dataclass(frozen=True)
class Size:
    """How much the demo rolls out.

    Attributes:
        scenes: videos, rolled out as one batch; each is one pair of the comparison.
        chunks: chunks generated after the given first one, in the drift part.
        healthy: chunks generated and made true before the chunk that is corrupted, in the fault part.
        after: chunks generated after the corrupted one.
        seed: of scenes, noise and blotches.
    """

    scenes: int = 12
    chunks: int = 30
    healthy: int = 6
    after: int = 8
    seed: int = 1

    @property
    def fault_at(self) -> int:
        """Index of the corrupted chunk; chunk 0 is given, then come the healthy ones."""
        return self.healthy + 1

    @property
    def fault_chunks(self) -> int:
        """Chunks generated in the fault part: healthy ones, the corrupted one, those after it."""
        return self.healthy + 1 + self.after

    @property
    def total_chunks(self) -> int:
        """Chunks that all rollouts generate."""
        return 2 * self.chunks + (1 + len(PLACES)) * self.fault_chunks


@dataclass(frozen=True)
class Arm:
    """One rollout.

    Attributes:
        video: latents ``[B, F, 3, 32, 32]``, on the CPU, the given chunk first; where a fault was planted, chunks up
            to it are those that the sampler was made to accept.
        seconds: wall clock of the sampler's loop.
        report: TokenTrim's records; None for an unpatched run.
        planted: the corrupted chunk, where a fault was planted.
    """

    video: Tensor
    seconds: float
    report: Report | None = None
    planted: Tensor | None = None

    def chunk(self, index: int) -> Tensor:
        """Chunk ``index`` of every video, the given one being 0: ``[B, 3, 3, 32, 32]``."""
        return self.video[:, index * FRAMES : (index + 1) * FRAMES]

    def pruned(self, chunk: int) -> list[bool]:
        """Per video, whether TokenTrim pruned and regenerated chunk ``chunk``."""
        records = [r for r in self.report or () if r.chunk == chunk]
        return [r.pruned for r in sorted(records, key=lambda r: r.sample)]


@dataclass(frozen=True)
class Runs:
    """Everything that was rolled out.

    ``drift`` holds the arms "unpatched" and "tokentrim", ``fault`` "unpatched" and one patched arm for each of PLACES.
    An unpatched model reads its context only, so to it both places are the same.
    """

    size: Size
    scene: Scene
    blotch: Blotch
    drift: dict[str, Arm]
    fault: dict[str, Arm]


def roll_out_all(pipeline: ReferencePipeline, size: Size, advance: Callable[[], None]) -> Runs:
    """Roll out both parts of the demo; ``advance`` is called after each generated chunk."""
    scene = scenes(size.seed, size.scenes, FRAMES * (1 + max(size.chunks, size.fault_chunks)))
    blotch = Blotch.draw(size.scenes, pipeline.generator.model.grid, (4, 4), size.seed)
    runner = Runner(pipeline, scene, blotch, size, advance)
    runner.warm_up()
    drift = {"unpatched": runner.roll(size.chunks), "tokentrim": runner.roll(size.chunks, patched=True)}
    count = size.fault_chunks
    fault = {"unpatched": runner.roll(count, where="context")}
    fault |= {where: runner.roll(count, patched=True, where=where) for where in PLACES}
    return Runs(size, scene, blotch, drift, fault)


class Runner:
    """Rolls out one arm at a time: same given chunk, same noise."""

    def __init__(
        self, pipeline: ReferencePipeline, scene: Scene, blotch: Blotch, size: Size, advance: Callable[[], None]
    ) -> None:
        self.pipeline, self.blotch, self.size, self.advance = pipeline, blotch, size, advance
        parameter = next(pipeline.generator.parameters())
        self.truth = scene.video.to(parameter)

    def roll(self, chunks: int, patched: bool = False, where: Where | None = None) -> Arm:
        """Generate ``chunks`` chunks after the given one; ``where`` plants the fault, else the run is natural."""
        with ExitStack() as stack:
            handle = stack.enter_context(patch(self.pipeline)) if patched else None
            planter = stack.enter_context(self._planter(where)) if where else None
            began = time.perf_counter()
            video = self._sample(chunks)
            seconds = time.perf_counter() - began
            report = handle.report if handle else None
        planted = planter.planted if planter else None
        return Arm(video, seconds, report, None if planted is None else planted.float().cpu())

    def warm_up(self) -> None:
        """One chunk that nobody looks at, so that the first timed run pays for no start-up."""
        advance, self.advance = self.advance, lambda: None
        self.roll(1)
        self.advance = advance

    def _planter(self, where: Where) -> Planter:
        pipeline = self.pipeline
        return Planter(
            pipeline.generator, self.truth, self.blotch, self.size.fault_at, pipeline.frame_seq_length, where
        )

    def _sample(self, chunks: int) -> Tensor:
        """All noise, the sampler's own included, follows from the seed; the global random state is left alone."""
        given = self.truth[:, :FRAMES].clone()
        video = [given]

        def collect(_index: int, _count: int, chunk: Tensor) -> None:
            video.append(chunk.clone())
            self.advance()

        devices = [given.device] if given.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.size.seed)
            noise = torch.randn(len(given), FRAMES * chunks, *given.shape[2:]).to(given)
            self.pipeline.inference(noise, initial_latent=given, on_chunk=collect)
        return torch.cat(video, dim=1).float().cpu()
