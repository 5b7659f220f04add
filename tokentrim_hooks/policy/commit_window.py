"""What the commit reads: Commit Forcing's newest frames, and self-caching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import flag, whole
from tokentrim_hooks.policy.views import ContextView, Place


@dataclass(frozen=True)
class CommitWindow(Policy):
    """The call that writes a finished chunk into the context reads only the newest frames; denoising reads all.

    Errors of old frames are then not copied into the rows of new ones. From Commit Forcing (repository
    Dwell-Jing/commit-forcing: 9 or 6 frames, no sink); ``frames=0`` is the self-caching of ID-Forcing (arXiv
    2610.03120).

    Args:
        frames: latent frames that the commit may read, the chunk's own among them; no more than those: only the chunk.
        anchors: whether it may read sinks and anchors, too.
        max_regenerations, persist, prune_anchors, coarse: of no effect here.

    Example:
        >>> handle = tokentrim.patch(pipeline, CommitWindow(frames=6))  # doctest: +SKIP
    """

    requires: ClassVar[frozenset[str]] = frozenset({"commit"})

    frames: int = 6
    anchors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("frames", self.frames)
        flag("anchors", self.anchors)

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """Hide all frames but the newest ones from a commit."""
        if chunk.phase != "commit":
            return None
        anchors = torch.tensor(context.anchors, dtype=torch.bool)
        # Newest first, sinks not counted: a sink is old, wherever it lies.
        age = (~anchors).flip(0).cumsum(0).flip(0)
        hidden = age > max(self.frames - chunk.frames, 0)
        return torch.where(anchors, torch.tensor(not self.anchors), hidden)
