"""What a patched model has shown at its first prune, for all of its videos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tokentrim_hooks.rollout.repeat.parts import Parts


@dataclass
class Proof:
    """What the first prune of a patched model has shown, for all its videos.

    Attributes:
        layers: self-attention modules whose tapped function also serves cross attention; 0 if it does not.
        expected: attention calls over the context in one denoiser call, as far as is known.
        enabled: False once the self-check of a prune failed. proven: True once it passed. finding: what it found.
        repeated: denoisers (referred to weakly) whose calls were shown to give the same when they are made twice.
        in_sequence: whether the context lies in the sequence, as far as is known: copies of it carry no mark.
        parts: which denoisers can be called with some samples of a batch.
    """

    layers: int = 0
    expected: int = 0
    enabled: bool = True
    proven: bool = False
    finding: str = ""
    repeated: list[Callable[[], object]] = field(default_factory=list)
    in_sequence: bool = False
    parts: Parts = field(default_factory=Parts)

    def repeats(self, denoiser: object) -> bool:
        """Whether a call of it was shown to give the same when it is made twice."""
        return any(known() is denoiser for known in self.repeated)
