"""Runs a pipeline unpatched, by the reference and patched, on the same noise and random stream, and compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from forced import ForcedPolicy
from masked_reference import MaskedReference, Prune, Source
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import PatchHandle

TOLERANCE, VISIBLE = 1e-5, 1e-3
"""Largest error against the reference; smallest effect of a prune that proves anything (latents have std about 1)."""

TOKENS = (3, 11, 17, 25, 40, 51, 66, 79)
OTHERS = (0, 8, 17, 33, 42, 64, 70, 78)
"""Token positions to prune: 8 of 80, as with the paper's fraction; one in common."""


@dataclass
class Comparison:
    """``generate()`` runs a fresh video and returns its latents; ``model`` is what gets patched."""

    generate: Callable[[], Tensor]
    model: Any
    source: Source
    spared: Sequence[int] = ()

    def run(self) -> Tensor:
        """Generate with a known random stream."""
        torch.manual_seed(0)
        return self.generate().clone()

    def reference(self, prunes: Sequence[Prune], **options: Any) -> Tensor:
        """The unpatched loop with dead keys masked by -inf; asserts that keys were masked at all."""
        options.setdefault("spared", self.spared)
        with MaskedReference(self.source, prunes, **options) as reference:
            latents = self.run()
        assert not prunes or any(any(counts) for counts in reference.masked)
        return latents

    def patched(self, policy: ForcedPolicy, **options: Any) -> tuple[Tensor, PatchHandle]:
        """The patched loop; its handle comes back unpatched, report intact."""
        with tokentrim.patch(self.model, policy, **options) as handle:
            latents = self.run()
        return latents, handle

    def exact(self, name: str, record: Callable[[str, Any], None], ours: Tensor, reference: Tensor) -> None:
        """Assert that ours equals the reference and that the prune was visible, against a run after unpatching."""
        unpruned = self.run()
        effect, error = difference(reference, unpruned), difference(ours, reference)
        print(f"{name:<58} effect {effect:.2e} error {error:.1e}")
        record("exact", (name, effect, error))
        assert effect > VISIBLE
        assert error <= TOLERANCE


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    return float((a - b).abs().nan_to_num(nan=float("inf")).max())


def trace(handle: PatchHandle, sample: int = 0) -> list[dict[str, int]]:
    """Denoiser calls by phase, chunk by chunk, of the latest video."""
    records = [record for record in handle.report if record.sample == sample]
    return [record.phases for record in records if record.video == records[-1].video]


def pruned_at(handle: PatchHandle, sample: int = 0) -> list[int]:
    """Chunks that were pruned, of the latest video."""
    records = [record for record in handle.report if record.sample == sample]
    return [record.chunk for record in records if record.video == records[-1].video and record.pruned]
