"""What a patched model has shown at its first prune, for all of its videos."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from tokentrim_hooks.errors import TokenTrimWarning
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.rollout.repeat.parts import Parts
from tokentrim_hooks.rollout.repeat.recall import Recall

OVERLOOKED = "not all attention of this call was tapped: what is dead in the sequence may have been read"

UNTAPPED = (
    "Switch off what answers with an earlier call's numbers (TeaCache); if attention was replaced, "
    "patch with replace=True."
)
"""What to do where less attention of a call was tapped than there is; what of both it is nobody can tell."""


@dataclass
class Proof:
    """What the first prune of a patched model has shown, for all its videos.

    Attributes:
        layers: self-attention modules whose tapped function also serves cross attention; 0 if it does not.
        expected: attention calls over the context in one denoiser call, as far as is known.
        enabled: False once the self-check of a prune failed. proven: True once it passed. finding: what it found.
        repeated: denoisers (referred to weakly) whose calls were shown to give the same when they are made twice.
        ordered: denoisers that were asked for the order of their rows.
        untapped: whether that was less attention than there is.
        in_sequence: whether the context lies in the sequence, as far as is known: copies of it carry no mark.
        parts: which denoisers can be called with some samples of a batch. recall: what is put back for repeated calls.
        overlooked: whether a call read, as it seems, what is dead, which is said once.
    """

    layers: int = 0
    expected: int = 0
    enabled: bool = True
    proven: bool = False
    finding: str = ""
    untapped: bool = False
    repeated: list[Callable[[], object]] = field(default_factory=list)
    ordered: list[Callable[[], object]] = field(default_factory=list)
    in_sequence: bool = False
    parts: Parts = field(default_factory=Parts)
    recall: Recall = field(default_factory=Recall)
    overlooked: bool = False

    def shows(self, calls: int, wanted: int, dead: int, finite: bool) -> bool:
        """Whether a replay behind a prune has left dead keys out at every attention call; keeps what it found."""
        self.finding = f"{calls} of {wanted} attention calls tapped, {dead} dead keys dropped, output finite: {finite}"
        self.untapped = calls < wanted
        if not (self.untapped or dead):
            self.finding += "; no mark in the V that attention reads: context() must name it, neither a copy nor K"
        return finite and dead > 0 and not self.untapped

    def refusal(self) -> str:
        """What is told of a prune that was not proved."""
        words = f"a prune could not be proved ({self.finding}); it was undone, and from now on we only observe"
        return f"{words}.\n{UNTAPPED}" if self.untapped else words

    def repeats(self, denoiser: object) -> bool:
        """Whether a call of it was shown to give the same when it is made twice."""
        return any(known() is denoiser for known in self.repeated)

    def orders(self, denoiser: object) -> bool:
        """Whether it was asked for the order of its rows."""
        return any(known() is denoiser for known in self.ordered)

    def overlooks(self, tap: CallTap | None) -> list[str]:
        """A note on a call that came back and has not asked everywhere which tokens of its sequence are dead.

        A cache's marks would surface there. A sequence has none: attention that somebody has put in the place of the
        tapped one reads what is dead in silence, until the next prune is found not to work.
        """
        wanted = max(self.expected, 1) if self.proven else 1
        if tap is None or tap.layout is None or tap.off or tap.calls >= wanted:
            return []
        told, self.overlooked = self.overlooked, True
        if not told:
            warnings.warn(
                f"pruned tokens may have been read: {tap.calls} of {wanted} attention calls of a call were tapped.\n"
                + UNTAPPED,
                TokenTrimWarning,
                stacklevel=2,
            )
        return [OVERLOOKED]
