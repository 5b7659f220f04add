"""Runs every setting over every batch of seeds with the same noise, skipping what the store has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.api import patch
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.compare.settings import Setting
from tokentrim_hooks.experiments.compare.store import Outcome, Store
from tokentrim_hooks.experiments.compare.trials import Trial
from tokentrim_hooks.policy.statistics import OVER_FRAMES_AND_PIXELS, Moments, pulled
from tokentrim_hooks.report.record import Report

Make = Callable[[Sequence[int]], Trial]


def batches(seeds: Sequence[int], size: int) -> list[list[int]]:
    """Seeds in runs of ``size``; the last may be shorter."""
    return [list(seeds[i : i + size]) for i in range(0, len(seeds), size)]


def compare(
    make: Make,
    settings: Sequence[Setting],
    groups: Sequence[Sequence[int]],
    store: Store,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Fill the store, batch by batch, so that an interrupted run holds whole comparisons of fewer seeds.

    Raises:
        TokenTrimError: another process is filling it.
    """
    with store.held():
        store.refresh()
        for seeds in groups:
            missing = [setting for setting in settings if not store.has(setting.name, seeds)]
            trial = make(seeds) if missing else None
            for setting in settings:
                if trial is not None and setting in missing:
                    store.add(outcome_of(trial, setting, seeds))
                advance()


@dataclass(frozen=True)
class Take:
    """One batch under one setting: what is stored of it, and what is not, the video and the report of a patched run."""

    outcome: Outcome
    video: Tensor
    report: Report | None


def outcome_of(trial: Trial, setting: Setting, seeds: Sequence[int]) -> Outcome:
    """Roll out one batch under one setting and measure it; raises as :func:`roll_out`."""
    return roll_out(trial, setting, seeds).outcome


def roll_out(trial: Trial, setting: Setting, seeds: Sequence[int]) -> Take:
    """Roll out one batch under one setting, measure it, keep everything.

    Raises:
        TokenTrimError: a measure does not give one value per seed, or the trial does not say what it is graded by.
    """
    with ExitStack() as stack, torch.no_grad():
        handle = None
        if not setting.off:
            handle = stack.enter_context(patch(trial.model, setting.policies(seeds[0]), probe=setting.probe))
        devices = list(range(torch.cuda.device_count()))
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(seeds[0])
        began = time.perf_counter()
        video = graded(trial, trial.run()) if setting.graded else trial.run()
        seconds = time.perf_counter() - began
        report = handle.report if handle is not None else None
    return Take(_outcome(trial, setting, seeds, video, report, round(seconds, 3)), video, report)


def graded(trial: Trial, video: Tensor) -> Tensor:
    """The video as an editor would grade it: every later chunk gets the moments per channel of the first one.

    Args:
        trial: its ``opening`` says how many frames of the video the first chunk makes.
        video: ``[B, F, C, H, W]``.

    Raises:
        TokenTrimError: it does not say so.
    """
    frames = opening_of(trial)
    first, *later = (video[:, start : start + frames] for start in range(0, video.shape[1], frames))
    target = Moments.of(first, OVER_FRAMES_AND_PIXELS)
    return torch.cat([first, *(pulled(part, OVER_FRAMES_AND_PIXELS, target, 1.0) for part in later)], dim=1)


def opening_of(trial: Trial) -> int:
    """Frames of the video that the first chunk makes.

    Raises:
        TokenTrimError: the trial does not say, so that nothing can be graded by them.
    """
    frames = getattr(trial, "opening", None)
    if type(frames) is not int or frames < 1:
        raise TokenTrimError(
            "grading afterwards needs to know how many frames of the video the first chunk makes.\n"
            "Give the trial an attribute `opening`, a whole number."
        )
    return frames


def _outcome(
    trial: Trial, setting: Setting, seeds: Sequence[int], video: Tensor, report: Report | None, seconds: float
) -> Outcome:
    records = list(report or ())
    values = {name: _column(name, column, seeds) for name, column in trial.measure(video).items()}
    first = [r for r in records if r.sample == 0]
    mine = [[r for r in records if r.sample == sample] for sample in range(len(seeds))]
    return Outcome(
        setting=setting.name,
        description=setting.as_dict(),
        seeds=list(seeds),
        values=values,
        judged=[sum(r.severity is not None for r in own) for own in mine],
        pruned=[[r.chunk for r in own if r.pruned] for own in mine],
        chunks=len(first),
        calls=sum(sum(r.phases.values()) for r in first),
        extra=sum(r.extra_calls for r in first),
        alone=[sum(r.extra_calls for r in own if r.pruned) for own in mine],
        seconds=seconds,
    )


def _column(name: str, values: Tensor, seeds: Sequence[int]) -> list[float]:
    column = [float(value) for value in torch.as_tensor(values).flatten()]
    if len(column) != len(seeds):
        raise TokenTrimError(
            f"measure() gave {len(column)} values of {name!r} for {len(seeds)} seeds; "
            "return one per seed"
        )
    return column
