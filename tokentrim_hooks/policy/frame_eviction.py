"""Whole frames that no longer resemble the newest one are not read: StableWorld's eviction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import number, whole
from tokentrim_hooks.policy.views import ContextView, Place


@dataclass(frozen=True)
class FrameEviction(Policy):
    """Frames of the context whose similarity to the newest one has fallen are read by no call.

    After StableWorld (arXiv 2601.15281), which compares decoded frames by matched key points (ORB, RANSAC), the oldest
    frame of a full window with a later one, and drops one of them before each new frame. Here latents are compared, by
    the cosine of small pictures of them, every frame with the newest finished one; nothing is decoded, and a frame that
    resembles the newest one again is read again. Its other half, to keep an old frame that is still similar and drop a
    newer one for it, would need a context that the model itself keeps longer.

    Args:
        similarity: the least cosine, from -1 to 1, with which a frame is read. The default is ours, not theirs: their
            0.78 is a share of matched points.
        keep: the newest frames, which are always read.
        prune_anchors: also hide anchors where they are known; by default they are always read.
        max_regenerations, persist, coarse: of no effect here.
    """

    similarity: float = 0.5
    keep: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        number("similarity", self.similarity, -1.0, 1.0, "in [-1, 1]")
        whole("keep", self.keep)

    @property
    def compares(self) -> bool:
        """It needs summaries of the frames."""
        return True

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """Hide what is too far from the newest frame, ``[B, frames, tokens]``; None while nothing is known of any."""
        if context.summaries is None:
            return None
        newest = context.summaries[:, -1:]
        cosine = torch.nn.functional.cosine_similarity(context.summaries, newest, dim=-1)
        # NaN, a frame that nobody saw being made, is no reason to hide it.
        hidden = cosine < self.similarity
        hidden[:, max(context.frames - self.keep, 0) :] = False
        if not self.prune_anchors:
            hidden &= ~torch.tensor(context.anchors, dtype=torch.bool)
        return hidden[:, :, None].expand(-1, -1, context.tokens)
