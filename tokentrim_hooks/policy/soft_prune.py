"""Older frames weigh less in attention: Recency Forcing, in its exact form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import flag, number, whole
from tokentrim_hooks.policy.views import ContextView, Place


@dataclass(frozen=True)
class SoftPrune(Policy):
    """Every call reads older frames with less weight than its own chunk and the newest frames.

    A weight w multiplies what a key gets of attention before that is made to sum to 1 again: the same as adding log w
    to its scores, the non-positive bias of Recency Forcing (arXiv 2609.19729), but with any attention kernel. Weight 0
    hides, as pruning does; 1 changes nothing.

    Args:
        weight: of the frames concerned, in [0, 1]. The default is ours and was not tuned on any model.
        keep: the newest finished frames, which keep the weight 1.
        anchors: whether sinks and anchors weigh less, too.
        max_regenerations, persist, prune_anchors, coarse: of no effect here.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"weigh"})

    weight: float = 0.5
    keep: int = 3
    anchors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("weight", self.weight, 0.0, 1.0, "in [0, 1]")
        whole("keep", self.keep)
        flag("anchors", self.anchors)

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """The weight of each frame, ``[frames]``; None where all are 1."""
        anchors = torch.tensor(context.anchors, dtype=torch.bool)
        # Newest first, sinks not counted: a sink is old, wherever it lies.
        age = (~anchors).flip(0).cumsum(0).flip(0)
        lighter = torch.where(anchors, torch.tensor(self.anchors), age > self.keep)
        return None if self.weight == 1 else torch.where(lighter, self.weight, 1.0)
