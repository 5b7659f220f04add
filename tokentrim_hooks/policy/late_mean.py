"""LateMean: a chunk ends as the mean of its last predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.options import whole
from tokentrim_hooks.policy.views import Denoised


@dataclass(frozen=True)
class LateMean(Policy):
    """The answer is the mean of the last few x0 predictions, for late steps over-sharpen (T-RFlow, arXiv 2606.22370).

    Args:
        last: how many predictions, the last one among them; a chunk of fewer steps uses those it has.
        max_regenerations, persist, prune_anchors, coarse: of no effect here.
    """

    last: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("last", self.last, least=1)

    @property
    def remembers(self) -> int:
        """Earlier predictions of a chunk that :meth:`correct` is shown."""
        return self.last - 1

    def correct(self, chunk: Denoised) -> Tensor | None:
        """The mean of the last predictions."""
        late = [*chunk.earlier, chunk.prediction][-self.last :]
        mean = torch.stack([x0.to(torch.promote_types(x0.dtype, torch.float32)) for x0 in late]).mean(0)
        return mean.to(chunk.prediction.dtype) if len(late) > 1 else None
