"""Interleaved timing of a model unpatched, observed, and pruned; every figure comes from one process in one run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tokentrim_hooks.api import patch
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.bench.ideal import ideal
from tokentrim_hooks.experiments.bench.memory import peak_bytes
from tokentrim_hooks.experiments.bench.profile import profile
from tokentrim_hooks.experiments.bench.target import Target
from tokentrim_hooks.experiments.bench.timing import seconds_of
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.token_trim import ObservePolicy
from tokentrim_hooks.testing.policies import ForcedPolicy
from tokentrim_hooks.testing.syncs import count_syncs

FRACTION = 0.1
"""Share of the tokens that a forced trigger prunes: the paper's p."""
EVERY = 20
"""A forced trigger at each 20th chunk: the paper's rate of about 5 %."""
RESAMPLES, SEED = 9999, 20260
"""Of the bootstrap of a median of ratios, which no t interval is for; a fixed seed gives the same interval again."""


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of one arm's time (see :func:`seconds_of`) over another's, with a 95 % bootstrap interval."""

    name: str
    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Results:
    """All that one run measured.

    Attributes:
        seconds: median time of a rollout by arm, see :func:`seconds_of`.
        ratios: of arms within rounds. ``unpatched again`` over ``unpatched`` shows the noise of the machine.
        triggers: chunks that were pruned in the forced arm, and ``chunks`` of how many.
        dead: context rows that died in the forced arm.
        extra_calls, calls: of the denoiser in the forced arm. proof_calls: those that its first prune cost besides,
            once per patch: the clock looks at a video after it.
        shares: by arm, share of each of our scopes of the time, and the rest.
        syncs: by arm, tokentrim's own host synchronisations per chunk. theirs: the model's and its sampler's.
        memory: by arm, peak bytes.
    """

    seconds: dict[str, float]
    ratios: list[Ratio]
    triggers: int
    chunks: int
    dead: int
    extra_calls: int
    proof_calls: int
    calls: int
    shares: dict[str, dict[str, float]]
    syncs: dict[str, float]
    theirs: dict[str, float]
    memory: dict[str, int]


IDEAL = "ideal"
"""The arm of a hand-written loop, see :mod:`~tokentrim_hooks.experiments.bench.ideal`."""
Arm = Policy | str | None
"""A policy to patch with, IDEAL, or None for the model as it is."""


def arms(chunks: int, target: Target, policies: Mapping[str, Policy] | None = None) -> dict[str, Arm]:
    """Arms by name, in the order of a round: those of every run, then ``policies``, then the forced trigger."""
    forced = ForcedPolicy({chunk: FRACTION for chunk in forced_chunks(chunks)})
    hand: dict[str, Arm] = {} if target.denoiser is None else {IDEAL: IDEAL}
    plain: dict[str, Arm] = {"unpatched": None, "unpatched again": None, **hand, "observing": ObservePolicy()}
    return {**plain, **(policies or {}), "forced trigger": forced}


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Which arm is divided by which: all by the unpatched one; policies by observing, which by the ideal."""
    names = list(names)
    named = [name for name in names if name not in ("unpatched", "unpatched again", IDEAL, "observing")]
    over = [(name, "unpatched") for name in names if name != "unpatched"]
    return [*over, *([("observing", IDEAL)] if IDEAL in names else []), *((name, "observing") for name in named)]


def forced_chunks(chunks: int) -> list[int]:
    """One chunk of each EVERY, early enough that the pruned rows are read for a while; chunk 0 is never judged."""
    return list(range(max(1, 2 * min(chunks, EVERY) // 5), chunks, EVERY))


def measure(
    target: Target,
    chunks: int,
    rounds: int,
    device: str,
    advance: Callable[[], None],
    more: Mapping[str, Policy] | None = None,
) -> Results:
    """Time, profile, count and weigh; ``advance`` is called after every rollout (:func:`rollouts` in number).

    ``more`` are policies by name, each an arm of its own.

    Raises:
        TokenTrimError: the model was patched but no chunk was judged, or the forced trigger pruned nothing; before
            anything runs, it does not take one of the policies.
    """
    policies = arms(chunks, target, more)
    for policy in policies.values():  # what the model does not take is refused before anything runs
        with _attached(target, policy):
            pass
    report = [_once(target, policy, advance)[1] for policy in policies.values()][-1]
    records = list(report)
    if not any(r.severity is not None for r in records) or not report.triggers:
        first, *_ = report.summary().splitlines()
        raise TokenTrimError(
            f"this run cannot be measured: {first}\nChoose another --target, or settings that prune something."
        )
    times: dict[str, list[float]] = {name: [] for name in policies}
    names = list(policies)
    for turn in range(rounds):
        # Each arm takes each place equally often, so that a drifting clock or a warming chip favours none.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_once(target, policies[name], advance, device, settled=True)[0])
    patched = {name: policy for name, policy in policies.items() if isinstance(policy, Policy)}
    counted = {name: _syncs(target, policy, device, advance) for name, policy in patched.items()}
    weighed = {name: policy for name, policy in policies.items() if name != "unpatched again"}
    return Results(
        seconds={name: statistics.median(column) for name, column in times.items()},
        ratios=[_ratio(f"{over} / {under}", times[over], times[under]) for over, under in pairs(policies)],
        triggers=report.triggers,
        chunks=len(records),
        dead=sum(r.dead for r in records),
        extra_calls=sum(r.extra_calls for r in records),
        proof_calls=sum(r.proof_calls for r in records),
        calls=sum(sum(r.phases.values()) for r in records),
        shares={name: _profile(target, policy, device, advance) for name, policy in patched.items()},
        syncs={name: ours / len(records) for name, (ours, _) in counted.items()},
        theirs={name: theirs / len(records) for name, (_, theirs) in counted.items()},
        memory={name: _peak(target, policy, device, advance) for name, policy in weighed.items()},
    )


def rollouts(rounds: int, arms: int, patched: int) -> int:
    """Rollouts that :func:`measure` makes of so many arms, so many of them patched."""
    return arms * (1 + rounds) + 2 * patched + arms - 1


def _attached(target: Target, arm: Arm) -> AbstractContextManager[Any]:
    """The target, patched or watched, for the length of the block."""
    if isinstance(arm, Policy):
        return patch(target.model, arm)
    return ideal(target) if arm == IDEAL else nullcontext()


def _once(
    target: Target, policy: Arm, advance: Callable[[], None], device: str = "cpu", settled: bool = False
) -> tuple[float, Any]:
    """Seconds of one rollout, and the report of a patched one. Patching itself is outside the clock.

    So is, where all is to be ``settled``, a first video of a policy that prunes: a patch proves its first prune once.
    """
    with _attached(target, policy) as handle:
        if settled and isinstance(policy, ForcedPolicy):
            target.run()
        seconds = seconds_of(target.run, device)
        report = handle.report if isinstance(policy, Policy) else None
    advance()
    return seconds, report


def _syncs(target: Target, policy: Policy, device: str, advance: Callable[[], None]) -> tuple[int, int]:
    with patch(target.model, policy), count_syncs(emulate=torch.device(device).type == "cpu") as log:
        target.run()
    advance()
    return len(log.ours), len(log.theirs)


def _profile(target: Target, policy: Policy, device: str, advance: Callable[[], None]) -> dict[str, float]:
    def run() -> None:
        with patch(target.model, policy):
            target.run()

    shares = profile(run, device)
    advance()
    return shares


def _peak(target: Target, policy: Arm, device: str, advance: Callable[[], None]) -> int:
    with _attached(target, policy):
        peak = peak_bytes(target.run, device)
    advance()
    return peak


def _ratio(name: str, over: Sequence[float], under: Sequence[float]) -> Ratio:
    import numpy as np
    from scipy.stats import bootstrap

    ratios = np.asarray([a / b for a, b in zip(over, under, strict=True)])
    low, high = -math.inf, math.inf
    if len(ratios) > 1:
        found = bootstrap(
            (ratios,), np.median, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(SEED)
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return Ratio(name, float(np.median(ratios)), low, high, len(ratios))
