"""What the demo rolls out: settings and trials of ``tokentrim compare``, whose videos are kept for the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokentrim_hooks.experiments.compare.rollouts import Take, roll_out
from tokentrim_hooks.experiments.compare.settings import STANDARD
from tokentrim_hooks.experiments.compare.table import Row, summarise
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker, ReferenceTrial
from tokentrim_hooks.reference.fault import FAULTS, Where

OFF, PAPER = STANDARD[:2]
PLANTED: Where = "context"
"""The demo's fault."""
ACTS: tuple[tuple[str, str, str, Where | None], ...] = (
    ("fault", "A planted fault", "fading", PLANTED),
    ("burning", "Natural drift: the burning model", "burning", None),
    ("fading", "Natural drift: the fading model", "fading", None),
)
"""Name, title, kind of the reference model, fault."""


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
    chunks: int = 20
    after: int = 8
    seed: int = 1

    @property
    def fault_chunks(self) -> int:
        """Chunks generated in the fault's act: true ones, the corrupted one, those after it."""
        return FAULTS[PLANTED].last + self.after

    @property
    def total_chunks(self) -> int:
        """Chunks that all rollouts generate."""
        return 2 * sum(self.fault_chunks if fault else self.chunks for *_, fault in ACTS)


@dataclass(frozen=True)
class Act:
    """One comparison, rolled out: the model as it is, and under the paper's policy."""

    name: str
    title: str
    trial: ReferenceTrial
    off: Take
    paper: Take

    @property
    def rows(self) -> list[Row]:
        """The unpatched row and the patched one, as ``tokentrim compare`` would have them."""
        return summarise([self.off.outcome, self.paper.outcome], self.trial.columns, self.trial.watch)


def play(load: Callable[..., ReferenceMaker], size: Size, advance: Callable[..., Any]) -> list[Act]:
    """Roll out all acts; ``load`` makes a :class:`ReferenceMaker`, ``advance`` is called after each chunk."""
    seeds = range(size.seed, size.seed + size.scenes)
    acts = []
    for name, title, kind, fault in ACTS:
        chunks = size.fault_chunks if fault else size.chunks
        acts.append(_act(name, title, load(kind=kind, chunks=chunks, fault=fault, on_chunk=advance), seeds))
    return acts


def _act(name: str, title: str, maker: ReferenceMaker, seeds: Sequence[int]) -> Act:
    trial = maker(seeds)
    return Act(name, title, trial, roll_out(trial, OFF, seeds), roll_out(trial, PAPER, seeds))
