"""A policy's judge, asked again chunk by chunk with what a log has of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tokentrim_hooks.policy.adaptive import AdaptivePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import RunningStatistics
from tokentrim_hooks.policy.token_trim import DriftPolicy, ObservePolicy
from tokentrim_hooks.policy.views import Chunk, History, Verdict
from tokentrim_hooks.report.record import ChunkRecord

PAPER = (DriftPolicy, ObservePolicy)
"""Policies that measure drift from the chunk before, as the paper does."""
Key = tuple[int, int]
"""Video and sample."""


class NotLoggedError(Exception):
    """A policy asks for something that no log holds; the message says what."""


def _absent(*_: Any, **__: Any) -> Any:
    raise NotLoggedError(
        "it reads the latents of chunks, of which a log holds only the drift. The log of a run that it watched, "
        "Watched(DriftPolicy(), watcher=...), has what it measured"
    )


class _NotLogged:
    """Stands where a policy would find latents: whatever it does with them, it hears that they are not there."""

    __getattr__ = _absent
    __torch_function__ = classmethod(_absent)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_NotLogged, f"__{_name}__", _absent)
    setattr(_NotLogged, f"__r{_name}__", _absent)
for _name in ("len", "iter", "getitem", "neg", "abs", "invert", "bool", "float", "int"):
    setattr(_NotLogged, f"__{_name}__", _absent)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_NotLogged, f"__{_name}__", _absent)

LATENTS: Any = _NotLogged()


@dataclass
class _Sample:
    """Where a sample of a video is: its statistics, and whether any decision has been another one."""

    statistics: RunningStatistics
    differs: bool = False
    lost: bool = False


@dataclass
class Replay:
    """One policy over the records of a log, in their order.

    While it decides as the run did, what it is shown is what it would have been shown. From the first other decision of
    a sample on, that sample would have become another video; its record is all there is, so the rest is a guess.

    Attributes:
        policy: asked again. same: whether the log's severities are the policy's own (the paper's, over the same
            fraction): they are exact, while the drift of single tokens has four digits.
        watched: whether the policy's own are those of the one that watched; then ``same`` holds, too.
        judged, pruned: decisions made, and those to prune. agreed: those that the run made, too.
        named: (video, sample, chunk) of the first that are pruned. first: of the first other decision.
        sure: decisions up to and with a sample's first other one: these are exact where ``same``.
        lost: records of videos whose beginning the log has not.
        lacks: what the log would have to hold for an answer; empty where there is one.
    """

    policy: Policy
    same: bool
    judged: int = 0
    pruned: int = 0
    agreed: int = 0
    sure: int = 0
    lost: int = 0
    named: list[tuple[int, int, int]] = field(default_factory=list)
    first: tuple[int, int, int] | None = None
    lacks: str = ""
    watched: bool = False
    _samples: dict[Key, _Sample] = field(default_factory=dict)

    def feed(self, record: ChunkRecord) -> Verdict | None:
        """Judge one more record; None where there is nothing to judge or nothing to judge it by."""
        if self._severity(record) is None or self.lacks:
            return None
        sample = self._sample(record)
        if sample.lost:
            self.lost += 1
            return None
        try:
            verdict = self.policy.judge(self._chunk(record), _history(sample.statistics))
        except NotLoggedError as failure:
            self.lacks = str(failure)
            return None
        if verdict is not None:
            self._count(record, sample, self._prunes(verdict))
            accepted = self._accepted(record, verdict)
            sample.statistics = sample.statistics.updated(torch.tensor([accepted], dtype=torch.float64))
        return verdict

    def _severity(self, record: ChunkRecord) -> float | None:
        return record.watched if self.watched else record.severity

    def _sample(self, record: ChunkRecord) -> _Sample:
        """Statistics begin anew where the run's did: there a record has no mean."""
        key = (record.video, record.sample)
        found = self._samples.get(key)
        if found is None or record.mean is None:
            differs = found is not None and found.differs
            found = self._samples[key] = _Sample(RunningStatistics.empty(1, keep=self.policy.recalls), differs)
            found.lost = record.mean is not None
        return found

    def _chunk(self, record: ChunkRecord) -> Chunk:
        """The chunk as far as it is in the log. One token that drifts by the severity has that very severity."""
        severity = self._severity(record)
        if self.same and severity is not None:
            return _as_severe_as(record, severity)
        if len(record.drift) and len(record.drift) == record.grid[0] * record.grid[1]:
            drift, grid = torch.tensor([list(record.drift)]), record.grid
        else:
            raise NotLoggedError("it reads the drift of every token, which is not in this log")
        place = ("first", record.chunk, record.start, record.frames, grid)
        return Chunk(*place, prediction=LATENTS, drift=drift, summary=LATENTS, previous=LATENTS, first=LATENTS)

    def _prunes(self, verdict: Verdict) -> bool:
        return self.policy.max_regenerations > 0 and bool(verdict.prune.any())

    def _count(self, record: ChunkRecord, sample: _Sample, prunes: bool) -> None:
        place = (record.video, record.sample, record.chunk)
        self.judged += 1
        self.pruned += prunes
        self.agreed += prunes == record.pruned
        self.sure += not sample.differs
        if prunes and len(self.named) < 12:
            self.named.append(place)
        if prunes != record.pruned or (self.watched and prunes):  # a watcher prunes other tokens
            sample.differs = True
            self.first = self.first or place

    def _accepted(self, record: ChunkRecord, verdict: Verdict) -> float:
        """The severity that would have entered the statistics, as far as it is known."""
        own, found = float(verdict.severity[0]), self._severity(record)
        accepted = record.accepted_watched if self.watched else record.accepted_severity
        if accepted is None or not found or record.pruned != self._prunes(verdict):
            return own
        # Of another severity than the log's, what was accepted is not known: it is taken to have fallen as that did.
        return accepted if self.same else own * accepted / found


def _as_severe_as(record: ChunkRecord, severity: float) -> Chunk:
    """A chunk of one token that has this severity: by its drift, and by how new it is to the scene.

    Its scene begins with nothing, so AdaptivePolicy's least deviation is a share of the median alone: the hundredth of
    a token's size, which is more where hardly anything moves, is in no log.
    """
    alone = torch.tensor([[severity]], dtype=torch.float64)
    nothing, place = torch.zeros(1, 1, 1, 1, 1), ("first", record.chunk, record.start, record.frames, (1, 1))
    same, first = alone[..., None], torch.zeros(1, 1, 1, dtype=torch.float64)
    return Chunk(*place, prediction=nothing, drift=alone, summary=same, previous=same, first=first)


def _history(statistics: RunningStatistics) -> History:
    recent = statistics.recent if statistics.count else None
    return History(statistics.count, statistics.mean, statistics.std, recent)


def of_the_run(settings: Mapping[str, Any]) -> Policy | None:
    """The judge that ran, the paper's, one that watched as it does, or AdaptivePolicy; None where another kind ran.

    ``settings`` are a log's, so they may hold anything.
    """
    return _named(f"{settings.get('policy')}+{settings.get('policy.policy')}", settings, "policy.")


def watcher_of(settings: Mapping[str, Any]) -> Policy | None:
    """The policy that watched; None where none did, or another kind."""
    return _named(str(settings.get("policy.watcher")), settings, "policy.watcher.")


def _named(text: str, settings: Mapping[str, Any], prefix: str) -> Policy | None:
    """The first policy that ``text`` names, with the options that ``settings`` have behind ``prefix``."""
    names = {part.strip() for part in text.split("+")}
    kinds: dict[str, type[Policy]] = {kind.__name__: kind for kind in (*PAPER, AdaptivePolicy)}
    kind = next((kinds[name] for name in kinds if name in names), None)
    if kind is None:
        return None
    known = {name: settings[f"{prefix}{name}"] for name in kind().settings() if f"{prefix}{name}" in settings}
    try:
        return kind(**known)
    except (TypeError, ValueError):
        return None


def same_severity(policy: Policy, ran: Policy | None) -> bool:
    """Whether a policy measures the severity that the log has."""
    if isinstance(policy, AdaptivePolicy) and isinstance(ran, AdaptivePolicy):
        return all(getattr(policy, name) == getattr(ran, name) for name in ("fraction", "fresh", "reach"))
    return isinstance(policy, PAPER) and isinstance(ran, PAPER) and policy.fraction == ran.fraction
