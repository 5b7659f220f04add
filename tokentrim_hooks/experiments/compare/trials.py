"""What ``tokentrim compare`` asks of a model: a function of seeds that returns a :class:`Trial`.

::

    def make(seeds):  # one batch: a sample for each seed
        pipeline = ...  # may be kept between calls
        noise = ...

        class MyTrial:
            model = pipeline  # what tokentrim.patch takes
            columns = (Column("saturation", "stability"), Column("motion", "motion"))
            settings = {"steps": 4}

            def run(self):  # -> video [B, F, C, H, W]; must give the same for the same seeds
                return pipeline.inference(noise)

            def measure(self, video):  # -> {column name: one value for each sample}
                return {"saturation": ..., "motion": ...}

        return MyTrial()

Random numbers that ``run`` draws from torch's global stream are seeded before every run, so that all settings see the
same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.reference.fault import FAULTS, Blotch, Fault, Planter, Where
from tokentrim_hooks.reference.kinds import BASE, weights_file
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.reference.quality import METRICS, MORE, window
from tokentrim_hooks.reference.scenes import Scene, scenes

ASPECTS = {
    "colour histogram error": "stability",
    "saturation error": "stability",
    "sprites alive (identity)": "identity",
    "error to ground truth": "stability",
    "motion error": "motion",
    "motion / true motion": "motion",
    "contrast / true contrast": "stability",
    "background error": "stability",
    "sprite place error (pixels)": "motion",
}
"""What a measure is about. Of those that tell drift apart, contrast, background and place stand in tables, too."""
MEASURES = tuple(metric for metric in (*METRICS, *MORE) if metric.name in ASPECTS)
OFFSETS = (1, 4, 8, 12)
"""Chunks after the last corrupted one at which the error around it is measured."""


@dataclass(frozen=True)
class Column:
    """A measure: its name, what it is about ("stability", "identity", "motion"), "lower"/"higher" if one is better.

    Columns of different ``window`` (a part of the video) stand under one another in the table.
    """

    name: str
    aspect: str = ""
    better: str = ""
    window: str = ""

    @property
    def key(self) -> str:
        """Name under which :meth:`Trial.measure` returns it: ``name``, or ``name @ window``."""
        return f"{self.name} @ {self.window}" if self.window else self.name


class Trial(Protocol):
    """One batch of seeds, ready to be rolled out. ``settings`` is whatever makes results comparable.

    An optional attribute ``watch`` is the ordinal of a chunk of which the table shall say how often it was pruned;
    ``opening``, how many frames of the video the first chunk makes, is what grading afterwards needs.
    """

    model: Any
    columns: Sequence[Column]
    settings: Mapping[str, Any]

    def run(self) -> Tensor:
        """Roll out; returns the video ``[B, F, C, H, W]``."""
        ...

    def measure(self, video: Tensor) -> Mapping[str, Tensor]:
        """Measure a video: ``[B]`` for each column's key, NaN where there is nothing to measure."""
        ...


@dataclass(frozen=True)
class ReferenceMaker:
    """Makes trials of the reference model.

    Attributes:
        pipeline: used by all trials, one after the other.
        chunks: generated after the given first one.
        fault: name of the planted fault, a key of ``reference.fault.FAULTS``, or None for the natural drift.
        weights: what the model is, for the settings. kind: how it drifts (a key of ``reference.kinds.KINDS``).
        sink: frames of the sink (anchor).
        on_chunk: called after every generated chunk.
    """

    pipeline: ReferencePipeline
    chunks: int
    fault: Where | None = None
    weights: str = "untrained"
    sink: int = 0
    on_chunk: Callable[..., None] | None = None
    kind: str = BASE

    @classmethod
    def load(
        cls,
        chunks: int,
        fault: Where | None,
        sink: int | None,
        trained: bool,
        device: str,
        on_chunk: Callable[..., None] | None = None,
        kind: str = BASE,
    ) -> ReferenceMaker:
        """The trained model of a kind, or a tiny random one on the same frames; ``sink`` None: as it was trained.

        Raises:
            TokenTrimError: too few chunks for a fault.
        """
        if fault and chunks < (needs := FAULTS[fault].needs):
            raise TokenTrimError(
                f"{fault!r} needs at least {needs} chunks: it is planted in {FAULTS[fault]}; "
                "set --chunks"
            )
        if trained:
            pipeline = ReferencePipeline.pretrained(kind, device=device, sink_size=sink)
            weights = hashlib.sha256(weights_file(kind).read_bytes()).hexdigest()[:12]
        else:
            pipeline, weights = ReferencePipeline.random(grid=(8, 8), sink_size=sink or 0, device=device), "untrained"
        attention: Any = pipeline.generator.model.blocks[0].self_attn
        kept = int(attention.sink_size)
        return cls(pipeline, chunks, fault, weights, kept, on_chunk, kind)

    def __call__(self, seeds: Sequence[int]) -> ReferenceTrial:
        """A batch: for each seed its scene, its first noise and, for a fault, its blotch."""
        return ReferenceTrial(self, seeds)


class ReferenceTrial:
    """The reference model over drawn scenes; see :class:`Trial`."""

    def __init__(self, maker: ReferenceMaker, seeds: Sequence[int]) -> None:
        self.maker, self.model, self.seeds = maker, maker.pipeline, seeds
        self.frames = self.opening = self.model.num_frame_per_block
        self.scene = joined([scenes(seed, 1, self.frames * (1 + maker.chunks)) for seed in seeds])
        grid = self.model.generator.model.grid
        self.blotch = Blotch.joined([Blotch.draw(1, grid, (4, 4), seed) for seed in seeds])
        self.fault = FAULTS[maker.fault] if maker.fault else None
        self.watch = self.fault.last + 1 if self.fault else None
        fault, chunks = self.fault, maker.chunks
        self.columns: Sequence[Column] = fault_columns(chunks, fault) if fault else drift_columns(chunks)
        self.settings: Mapping[str, Any] = {"model": "reference", "kind": maker.kind, "weights": maker.weights,
                         "chunks": maker.chunks, "sink": maker.sink,
                         "fault": maker.fault, "device": str(self._like.device)}  # fmt: skip

    @property
    def _like(self) -> Tensor:
        return next(self.model.parameters())

    def run(self) -> Tensor:
        """Generate after the given true chunk; returns pixels in about [-1, 1], on the CPU."""
        truth = self.scene.video.to(self._like)
        shape = (self.frames * self.maker.chunks, *truth.shape[2:])
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
        with ExitStack() as stack:
            if self.fault:
                tokens = self.model.frame_seq_length
                stack.enter_context(Planter(self.model.generator, truth, self.blotch, self.fault, tokens))
            noise = torch.stack(draws).to(truth)
            given, on_chunk = truth[:, : self.frames].clone(), self.maker.on_chunk
            video = self.model.inference(noise, initial_latent=given, return_latents=True, on_chunk=on_chunk)[1]
        return video.float().cpu()

    def measure(self, video: Tensor) -> dict[str, Tensor]:
        """Measures of :mod:`tokentrim_hooks.reference.quality`, or the error around the planted fault."""
        found = self._fault_errors(video, self.fault) if self.fault else {}
        for low, high in windows(self.maker.chunks, self.watch or 1):
            frames = slice(low * self.frames, (high + 1) * self.frames)
            part = window(self.scene, frames)
            for metric in MEASURES:
                found[f"{metric.name} @ {_name(low, high)}"] = metric.measure(video[:, frames], part)
        return found

    def _fault_errors(self, video: Tensor, fault: Fault) -> dict[str, Tensor]:
        found = {}
        for offset, column in error_columns(self.maker.chunks, fault).items():
            first = (fault.last + offset) * self.frames
            here = slice(first, first + self.frames)
            found[column.key] = self.blotch.error(video[:, here], self.scene.video[:, here])
        return found


def joined(parts: Sequence[Scene]) -> Scene:
    """Scenes of one video each as one batch: so that a scene depends on its own seed only."""
    return Scene(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def windows(chunks: int, first: int = 1) -> list[tuple[int, int]]:
    """First and second half of the chunks from ``first`` on, both ends inclusive; one window where that is too few."""
    half = (first - 1 + chunks) // 2
    return [(first, chunks)] if half < first else [(first, half), (half + 1, chunks)]


def drift_columns(chunks: int, first: int = 1) -> list[Column]:
    """Columns of a rollout from chunk ``first`` on, in two halves."""
    names = [_name(low, high) for low, high in windows(chunks, first)]
    return [Column(m.name, ASPECTS[m.name], m.better, name) for name in names for m in MEASURES]


def fault_columns(chunks: int, fault: Fault) -> list[Column]:
    """Columns of a rollout with a planted fault: the error around it, and what the whole picture does after it."""
    return [*error_columns(chunks, fault).values(), *drift_columns(chunks, fault.last + 1)]


def error_columns(chunks: int, fault: Fault) -> dict[int, Column]:
    """Columns of the error around the fault, by how many chunks after the last corrupted one it is measured."""
    offsets = [offset for offset in OFFSETS if fault.last + offset <= chunks]
    return {o: Column(f"error around the fault, +{o}", "stability", "lower") for o in offsets}


def _name(low: int, high: int) -> str:
    return f"chunks {low}-{high}"
