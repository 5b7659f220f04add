"""What a rank thinks of a chunk, and how it takes over what the first rank of its group thinks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.rollout.reading import Reading

MARKS = 48
"""Tokens whose drift ranks compare, at most; a third of that at least."""


@dataclass(frozen=True)
class Opinion:
    """An answer of :meth:`Regenerator`'s questions to itself, the same on all ranks once they have agreed.

    Attributes:
        reading: the verdict on the host; None where the policy has none. Its drift stays this rank's own.
        severity: of the verdict, ``[B]``; on the device, or on the host once it was agreed on.
        given: whether the chunk was handed in.
        again: whether the context was pruned, so that the denoiser is called again.
        holds: whether all that was checked is in order; on every rank, once agreed.
    """

    reading: Reading | None = None
    severity: Tensor | None = None
    given: bool = False
    again: bool = False
    holds: bool = True

    def marks(self) -> list[int]:
        """The drift of some tokens, in hundredths of its deviation: ranks that predict the same chunk agree on it."""
        drift = None if self.reading is None else self.reading.drift.flatten()
        if drift is None or drift.numel() < MARKS // 3:
            return []
        some = drift[:: -(-drift.numel() // MARKS)]
        deviation = some.std(correction=0)
        return [] if not deviation > 0 else ((some - some.mean()) / deviation * 100).round().int().tolist()

    def told(self) -> dict[str, Any]:
        """All but the drift, in terms of JSON; numbers survive that exactly."""
        told: dict[str, Any] = {"given": self.given, "again": self.again, "reading": None}
        if self.reading is not None:
            names = [field.name for field in dataclasses.fields(Reading) if field.name != "drift"]
            told["reading"] = {name: getattr(self.reading, name) for name in names}
        return told

    def adopt(self, told: dict[str, Any], holds: bool) -> Opinion:
        """The same with what the first rank has :meth:`told`."""
        said = told["reading"]
        if said is None:
            return Opinion(given=told["given"], again=told["again"], holds=holds)
        drift = torch.empty(len(said["prune"]), 0) if self.reading is None else self.reading.drift
        reading = Reading(**{**said, "drift": drift})
        severity = torch.tensor(reading.severity, dtype=torch.float64)
        return Opinion(reading, severity, told["given"], told["again"], holds)
