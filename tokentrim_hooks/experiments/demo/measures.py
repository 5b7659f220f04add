"""What the demo makes of its rollouts: paired comparisons, costs, and whether the planted fault was caught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from tokentrim_hooks.experiments.demo.runs import FRAMES, PLACES, Arm, Runs, Size
from tokentrim_hooks.metrics.intervals import Difference, adjusted, paired_difference
from tokentrim_hooks.reference.quality import METRICS, window

OFFSETS = (1, 4, 8)
"""Chunks after the fault at which the error around it is measured."""


@dataclass(frozen=True)
class Line:
    """One comparison: over which window, of what, which direction is better ("" for neither)."""

    window: str
    metric: str
    better: str
    difference: Difference


@dataclass(frozen=True)
class Cost:
    """What pruning cost and how often it happened.

    Attributes:
        judged: chunks of any video that got a verdict; triggered: of these, pruned and regenerated.
        tokens: token positions pruned; rows: context rows dead.
        calls: denoiser calls of the batch without TokenTrim; extra: further calls of the batch.
        alone: further calls, as a share, had every video been rolled out alone.
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


@dataclass(frozen=True)
class Fault:
    """The planted fault under TokenTrim: error around it, and how it was noticed.

    ``at_once`` is the share of videos whose next chunk was pruned, ``false_alarms`` that of the judged true chunks.
    """

    lines: Sequence[Line]
    at_once: float
    false_alarms: float
    cost: Cost


@dataclass(frozen=True)
class Results:
    """All that the demo reports. ``fault`` has one entry for each place of the fault."""

    size: Size
    drift: Sequence[Line]
    drift_cost: Cost
    fault: dict[str, Fault]


def measure(runs: Runs) -> Results:
    """Measure everything, once; each of the two tables of differences is adjusted for its own comparisons."""
    faults: dict[str, Fault] = {where: _fault(runs, where) for where in PLACES}
    lines = iter(_adjusted([line for fault in faults.values() for line in fault.lines]))
    faults = {where: replace(fault, lines=[next(lines) for _ in fault.lines]) for where, fault in faults.items()}
    cost = _cost(runs.drift["unpatched"], runs.drift["tokentrim"])
    return Results(runs.size, _adjusted(_drift_lines(runs)), cost, faults)


def _adjusted(lines: Sequence[Line]) -> list[Line]:
    differences = adjusted([line.difference for line in lines])
    return [replace(line, difference=difference) for line, difference in zip(lines, differences, strict=True)]


def windows(chunks: int, parts: int = 3) -> list[tuple[int, int]]:
    """About equal ranges of generated chunks, counted from 1, both ends inclusive."""
    edges = [round(chunks * i / parts) for i in range(parts + 1)]
    return [(low + 1, high) for low, high in pairwise(edges) if high > low]


def fault_error(runs: Runs, arm: Arm, offset: int) -> Tensor:
    """Squared error ``[B]`` around the place, ``offset`` chunks after the corrupted one."""
    index = runs.size.fault_at + offset
    truth = runs.scene.video[:, index * FRAMES : (index + 1) * FRAMES]
    return runs.blotch.error(arm.chunk(index), truth)


def _drift_lines(runs: Runs) -> list[Line]:
    arms = [runs.drift["unpatched"], runs.drift["tokentrim"]]
    lines = []
    for low, high in windows(runs.size.chunks):
        frames = slice(low * FRAMES, (high + 1) * FRAMES)
        scene = window(runs.scene, frames)
        for metric in METRICS:
            values = [metric.measure(arm.video[:, frames], scene).tolist() for arm in arms]
            lines.append(Line(f"chunks {low}-{high}", metric.name, metric.better, paired_difference(*values)))
    return lines


def _fault(runs: Runs, where: str) -> Fault:
    arms = [runs.fault["unpatched"], runs.fault[where]]
    lines = []
    for offset in (o for o in OFFSETS if o <= runs.size.after):
        values = [fault_error(runs, arm, offset).tolist() for arm in arms]
        after = f"{offset} chunk{'s' * (offset > 1)} later"
        lines.append(Line(after, "squared error around it", "lower", paired_difference(*values)))
    at = runs.size.fault_at
    once = arms[1].pruned(at + 1)
    healthy = [r.pruned for r in arms[1].report or () if r.chunk <= at and r.severity is not None]
    return Fault(lines, _share(once), _share(healthy), _cost(*arms))


def _cost(base: Arm, treated: Arm) -> Cost:
    records = list(treated.report or ())
    first = [r for r in records if r.sample == 0]
    own_calls = sum(sum(r.phases.values()) for r in records)
    return Cost(
        judged=sum(r.severity is not None for r in records),
        triggered=sum(r.pruned for r in records),
        tokens=sum(len(r.tokens) for r in records if r.pruned),
        rows=sum(r.dead for r in records),
        calls=sum(sum(r.phases.values()) for r in first),
        extra=sum(r.extra_calls for r in first),
        # With the first-step probe a regeneration is one call, and a video alone makes none for the others.
        alone=sum(r.regenerations for r in records) / max(own_calls, 1),
        clock=treated.seconds / base.seconds,
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(len(flags), 1)
