"""Some samples of a batch, with which a call is made again while the others stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Neighbouring samples ``first`` to ``stop`` (not itself) of a ``batch``.

    ``branches`` of guidance may share a batch, one whole batch behind the other: ``[a, b, a, b]``. ``before``: runs of
    the same call that come before this one.
    """

    first: int
    stop: int
    batch: int
    branches: int = 1
    before: int = 0

    @property
    def count(self) -> int:
        """How many they are."""
        return self.stop - self.first

    def fold(self, tensor: Tensor) -> int:
        """How many batches lie behind one another in the first dimension of a tensor; 0 if it is none of samples."""
        size = tensor.shape[0] if tensor.ndim else 0
        return next((n for n in (1, self.branches) if size == n * self.batch), 0)

    def of(self, tensor: Tensor) -> Tensor:
        """Their part of a tensor that holds one batch: a view."""
        return tensor[self.first : self.stop]

    def of_all(self, tensor: Tensor) -> Tensor:
        """Their part of a tensor that holds several batches: ``[n, B, ...]``, a view."""
        return tensor.view(self.fold(tensor), self.batch, *tensor.shape[1:])[:, self.first : self.stop]


def runs_of(flags: Sequence[bool], branches: int = 1) -> list[Samples]:
    """The flagged samples, as few runs of neighbours: a run is a view of every tensor, others would be copies."""
    runs: list[Samples] = []
    for place, flag in enumerate(flags):
        if flag and runs and runs[-1].stop == place:
            runs[-1] = dataclasses.replace(runs[-1], stop=place + 1)
        elif flag:
            runs.append(Samples(place, place + 1, len(flags), branches, before=len(runs)))
    return runs
