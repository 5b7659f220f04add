"""What the demo rolls out: settings and trials of ``tokentrim compare``, whose videos are kept for the pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokentrim_hooks.experiments.compare.rollouts import Take, roll_out
from tokentrim_hooks.experiments.compare.settings import METHODS, STANDARD, Setting
from tokentrim_hooks.experiments.compare.table import Row, summarise
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker, ReferenceTrial
from tokentrim_hooks.reference.fault import FAULTS, Where

OFF, PAPER = STANDARD[:2]
MOVES = next(setting for setting in METHODS if setting.name == "commit window 6 + row moments")
"""What was seen to move slow drift most on both models, over more videos than the demo has."""
PLANTED: Where = "context"
"""The demo's fault."""
ACTS: tuple[tuple[str, str, str, Where | None, tuple[Setting, ...]], ...] = (
    ("fault", "A planted fault", "fading", PLANTED, (PAPER,)),
    ("burning", "Natural drift: the burning model", "burning", None, (PAPER, MOVES)),
    ("fading", "Natural drift: the fading model", "fading", None, (PAPER, MOVES)),
)
"""Name, title, kind of the reference model, fault, what is compared with the unpatched model: the paper's first."""


@dataclass(frozen=True)
class Size:
    """How much the demo rolls out.

    Attributes:
        scenes: videos, rolled out as one batch; each is one pair of the comparison.
        chunks: chunks generated after the given one, where nothing is planted.
        after: chunks generated after a planted fault.
        seed: of the first scene and its noise.
    """

    scenes: int = 10
    chunks: int = 30
    after: int = 8
    seed: int = 1

    @property
    def fault_chunks(self) -> int:
        """Chunks generated in the fault's act: true ones, the corrupted one, those after it."""
        return FAULTS[PLANTED].last + self.after

    @property
    def total_chunks(self) -> int:
        """Chunks that all rollouts generate."""
        rollouts = ((self.fault_chunks if fault else self.chunks, settings) for *_, fault, settings in ACTS)
        return sum(chunks * (1 + len(settings)) for chunks, settings in rollouts)


@dataclass(frozen=True)
class Act:
    """One comparison, rolled out: the model as it is, under the paper's policy, and under others where there are."""

    name: str
    title: str
    trial: ReferenceTrial
    off: Take
    paper: Take
    others: Sequence[Take] = ()

    @property
    def takes(self) -> list[Take]:
        """All of them, the unpatched one first."""
        return [self.off, self.paper, *self.others]

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The unpatched row and those of the patched ones, as ``tokentrim compare`` would have them."""
        return summarise([take.outcome for take in self.takes], self.trial.columns, self.trial.watch)


def play(load: Callable[..., ReferenceMaker], size: Size, advance: Callable[..., Any]) -> list[Act]:
    """Roll out all acts; ``load`` makes a :class:`ReferenceMaker`, ``advance`` is called after each chunk."""
    seeds = range(size.seed, size.seed + size.scenes)
    acts = []
    for name, title, kind, fault, settings in ACTS:
        chunks = size.fault_chunks if fault else size.chunks
        trial = load(kind=kind, chunks=chunks, fault=fault, on_chunk=advance)(seeds)
        off, paper, *others = (roll_out(trial, setting, seeds) for setting in (OFF, *settings))
        acts.append(Act(name, title, trial, off, paper, others))
    return acts
