"""What a judge would be shown of unpatched rollouts, recorded once, so that many settings can be asked of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tokentrim_hooks.api import patched
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker, ReferenceTrial
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import RunningStatistics, token_drift
from tokentrim_hooks.policy.token_trim import ObservePolicy
from tokentrim_hooks.policy.views import Chunk, History, Verdict
from tokentrim_hooks.reference.fault import Where
from tokentrim_hooks.rollout.shared import Probe

TUNING = range(5000, 6000)
"""Seeds to search on; no table has one of them."""


@dataclass(frozen=True)
class Watcher(ObservePolicy):
    """Keeps what it is shown, and prunes nothing."""

    shown: list[dict[str, Tensor]] = field(default_factory=list)

    def judge(self, chunk: Chunk, history: History) -> Verdict:
        """Copies of what the chunk shows."""
        names = ("summary", "previous", "first", "prediction")
        self.shown.append({name: getattr(chunk, name).detach().cpu().clone() for name in names})
        return super().judge(chunk, history)


@dataclass(frozen=True)
class Watched:
    """Unpatched rollouts of a batch of seeds, chunk by chunk, as a judge would have met them.

    Attributes:
        name: kind of drift and fault. grid: of the tokens.
        watch: ordinal of the chunk in which a fault is to be noticed; None where none was planted.
        shown: per judged chunk ``summary``, ``previous``, ``first`` ``[B, N, D]`` and ``prediction``.
    """

    name: str
    grid: tuple[int, int]
    watch: int | None
    shown: list[dict[str, Tensor]]

    def flags(self, policy: Policy) -> Tensor:
        """Which chunks ``policy`` would have flagged, ``[chunks, B]``, chunk 1 first.

        Nothing is pruned, so each severity is that of the first answer, and a chunk behind the first that is flagged is
        not the one that the policy would have met.
        """
        statistics = RunningStatistics.empty(len(self.shown[0]["summary"]), keep=policy.recalls)
        flags = []
        for index, shown in enumerate(self.shown, 1):
            drift, frames = token_drift(shown["summary"], shown["previous"]), shown["prediction"].shape[1]
            chunk = Chunk("first", index, frames * index, frames, self.grid, drift=drift, **shown)
            history = History(statistics.count, statistics.mean, statistics.std, statistics.recent)
            verdict = policy.judge(chunk, history)
            assert verdict is not None, "a judge that has no opinion is not searched for"
            statistics = statistics.updated(verdict.severity)
            flags.append(verdict.prune)
        return torch.stack(flags)


def asked(description: str | None, seeds: int) -> tuple[Path, Sequence[int]]:
    """What a command line says: where rollouts are kept, and the tuning seeds to take, by default ``seeds`` of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="rollouts are kept here (180 MB)")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    return options.out, TUNING[: options.seeds]


def held_in(seeds: Sequence[int]) -> None:
    """See that all of them are tuning seeds.

    Raises:
        TokenTrimError: a seed that a table may report.
    """
    if not set(seeds) <= set(TUNING):
        raise TokenTrimError(
            "some of these seeds are held out, for tables report them.\n"
            f"Give tuning seeds, {TUNING.start} to {TUNING.stop - 1}."
        )


def watch(kind: str, fault: Where | None, seeds: Sequence[int], chunks: int, probe: Probe = "first-step") -> Watched:
    """Roll out the reference model on tuning seeds, and keep what a judge is shown.

    Raises:
        TokenTrimError: a seed that a table may report.
    """
    held_in(seeds)
    trial: ReferenceTrial = ReferenceMaker.load(chunks, fault, None, True, "cpu", kind=kind)(seeds)
    watcher = Watcher()
    with patched(trial.model, watcher, probe=probe), torch.no_grad():
        trial.run()
    return Watched(f"{kind}, {fault or 'no fault'}", trial.model.generator.model.grid, trial.watch, watcher.shown)


def kept(
    folder: Path, kind: str, fault: Where | None, seeds: Sequence[int], chunks: int, probe: Probe = "first-step"
) -> Watched:
    """:func:`watch`, or what an earlier call has left of the same in ``folder``."""
    name = f"{kind}-{fault}-{seeds[0]}-{len(seeds)}-{chunks}"
    file = folder / f"{name}{'' if probe == 'first-step' else '-' + probe}.pt"
    if not file.is_file():
        made = watch(kind, fault, seeds, chunks, probe)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(vars(made), file)
    return Watched(**torch.load(file, weights_only=True))
