"""What the demo measures of a rollout whose ground truth is known, per video and window of chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.demo_runs import FRAMES, Arm, Runs
from tokentrim_hooks.paired import Difference, paired_difference
from tokentrim_hooks.reference.scenes import Scene

ALIVE, CLOSE = 0.5, 0.5
BINS = 6


@dataclass(frozen=True)
class Metric:
    """One line of the table: ``measure(video [B, F, 3, H, W], scene of the same frames) -> [B]``.

    ``better`` is "lower" or "higher"; pixels are in [-1, 1], colours beyond are measured as they are.
    """

    name: str
    better: str
    measure: Callable[[Tensor, Scene], Tensor]


def colour_error(video: Tensor, scene: Scene) -> Tensor:
    """Distance of the colour histograms of video and truth: 0 the same, 1 no colour in common."""
    return (_histogram(video) - _histogram(scene.video)).abs().sum(1) / 2


def saturation_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute difference of mean saturation (largest minus smallest channel, 2 = a pure colour) to the truth's."""
    return (_saturation(video) - _saturation(scene.video)).abs()


def sprites_alive(video: Tensor, scene: Scene) -> Tensor:
    """Share of sprites of which, anywhere in the frame, half the true area is left in about the true colour."""
    distance = (video[:, :, None] - scene.colors[:, None, :, :, None, None]).square().mean(3).sqrt()
    found = (distance < CLOSE).float().sum((3, 4))
    visible = scene.masks.sum((3, 4))
    alive = (found >= ALIVE * visible) & (visible > 0)
    return alive.float().sum((1, 2)) / (visible > 0).sum((1, 2)).clamp(min=1)


def truth_error(video: Tensor, scene: Scene) -> Tensor:
    """Mean squared error of pixels to the truth."""
    return (video - scene.video).square().mean((1, 2, 3, 4))


def motion_error(video: Tensor, scene: Scene) -> Tensor:
    """Absolute logarithm of motion over true motion (mean change between frames): 0 as much, 0.7 half or double."""
    return (_motion(video).clamp(min=1e-6).log() - _motion(scene.video).clamp(min=1e-6).log()).abs()


def motion(video: Tensor, scene: Scene) -> Tensor:
    """Motion as a share of the true motion: mean absolute change between frames over the truth's."""
    return _motion(video) / _motion(scene.video).clamp(min=1e-6)


def _motion(video: Tensor) -> Tensor:
    return video.diff(dim=1).abs().mean((1, 2, 3, 4))


def _saturation(video: Tensor) -> Tensor:
    return (video.amax(2) - video.amin(2)).mean((1, 2, 3))


def _histogram(video: Tensor) -> Tensor:
    cells = ((video.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(max=BINS - 1)
    index = (cells[:, :, 0] * BINS + cells[:, :, 1]) * BINS + cells[:, :, 2]
    counts = torch.zeros(len(video), BINS**3).scatter_add_(1, index.flatten(1), torch.ones_like(index.flatten(1)).float())
    return counts / counts.sum(1, keepdim=True)


METRICS = (
    Metric("colour histogram error", "lower", colour_error),
    Metric("saturation error", "lower", saturation_error),
    Metric("sprites alive (identity)", "higher", sprites_alive),
    Metric("error to ground truth", "lower", truth_error),
    Metric("motion error", "lower", motion_error),
    Metric("motion / true motion", "", motion),
)


@dataclass(frozen=True)
class Line:
    """One measured comparison: what, over which window, which direction is better."""

    window: str
    metric: str
    better: str
    difference: Difference


def windows(chunks: int, parts: int = 3) -> list[tuple[int, int]]:
    """Ranges of generated chunks, ends inclusive, counted from 1: about equal parts."""
    edges = [round(chunks * i / parts) for i in range(parts + 1)]
    return [(low + 1, high) for low, high in zip(edges, edges[1:], strict=False) if high > low]


def drift_lines(runs: Runs) -> list[Line]:
    """Every metric in every window, unpatched against patched, paired over the videos."""
    base, treated = runs.drift["unpatched"], runs.drift["tokentrim"]
    lines = []
    for low, high in windows(runs.size.chunks):
        frames = slice(low * FRAMES, (high + 1) * FRAMES)
        scene = cut(runs.scene, frames)
        for metric in METRICS:
            values = [metric.measure(arm.video[:, frames], scene).tolist() for arm in (base, treated)]
            lines.append(Line(f"chunks {low}-{high}", metric.name, metric.better, paired_difference(*values)))
    return lines


def fault_lines(runs: Runs, where: str, offsets: Sequence[int] = (1, 4, 8)) -> list[Line]:
    """Squared error around the place of the fault, some chunks later, paired over the videos."""
    lines = []
    for offset in (o for o in offsets if o <= runs.size.after):
        values = [fault_error(runs, runs.fault[name], offset).tolist() for name in ("unpatched", where)]
        lines.append(Line(f"{offset} chunk{'s' * (offset > 1)} later", "squared error around it", "lower", paired_difference(*values)))
    return lines


def fault_error(runs: Runs, arm: Arm, offset: int) -> Tensor:
    """Squared error ``[B]`` around the place, ``offset`` chunks after the corrupted one."""
    index = runs.size.fault_at + offset
    truth = runs.scene.video[:, index * FRAMES : (index + 1) * FRAMES]
    return runs.blotch.error(arm.chunk(index), truth)


def cut(scene: Scene, frames: slice) -> Scene:
    """The same scene, only some of its frames."""
    return Scene(
        scene.video[:, frames], scene.positions[:, frames], scene.colors, scene.masks[:, frames], scene.palette, scene.shapes
    )


@dataclass(frozen=True)
class Cost:
    """What pruning cost and how often it happened.

    Attributes:
        judged: chunks of any video that got a verdict; triggered: of these, pruned and regenerated.
        tokens: token positions pruned; rows: context rows dead.
        calls: denoiser calls of the batch without TokenTrim; extra: further calls of the batch.
        alone: further calls, as a share, if every video had been rolled out alone.
        clock: wall clock of the patched rollout over the unpatched one's.
    """

    judged: int
    triggered: int
    tokens: int
    rows: int
    calls: int
    extra: int
    alone: float
    clock: float


def cost(base: Arm, treated: Arm) -> Cost:
    """Count a patched run's records; ``base`` is the same run unpatched."""
    records = list(treated.report or ())
    first = [r for r in records if r.sample == 0]
    calls = sum(sum(r.phases.values()) for r in first)
    own = sum(sum(r.phases.values()) for r in records)
    return Cost(
        judged=sum(r.severity is not None for r in records),
        triggered=sum(r.pruned for r in records),
        tokens=sum(len(r.tokens) for r in records if r.pruned),
        rows=sum(r.dead for r in records),
        calls=calls,
        extra=sum(r.extra_calls for r in first),
        alone=sum(r.regenerations for r in records) / max(own, 1),
        clock=treated.seconds / base.seconds,
    )


@dataclass(frozen=True)
class Caught:
    """Detection of a fault: shares of videos (``at_once``) and of healthy chunks with a verdict (``false_alarms``)."""

    at_once: float
    false_alarms: float


def caught(runs: Runs, where: str) -> Caught:
    """How often the chunk right after the fault was pruned, and how often a healthy chunk before it was."""
    arm, at = runs.fault[where], runs.size.fault_at
    once = arm.pruned(at + 1)
    healthy = [r.pruned for r in arm.report or () if r.chunk <= at and r.severity is not None]
    return Caught(sum(once) / max(len(once), 1), sum(healthy) / max(len(healthy), 1))
