"""Hiding dead keys in a ``BlockMask`` of flex attention, whose columns cannot be cut out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_block_mask(mask: Any) -> bool:
    """Whether a mask is a rule over (query, key), as flex attention takes it, and no tensor."""
    return mask is not None and not torch.is_tensor(mask) and callable(getattr(mask, "mask_mod", None))


def without_dead(mask: Any, index: Sequence[Tensor], batch: int, keys: int) -> Any:
    """The mask with dead keys hidden.

    A dead token still sees itself: no query may be left without a key, and nobody reads what it becomes.

    Args:
        mask: BlockMask over ``keys`` queries and keys.
        index: live keys, LongTensor; one for all samples, or one per sample.
        batch: number of samples.
        keys: number of keys.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    alive = torch.zeros(len(index), keys, dtype=torch.bool, device=index[0].device)
    for sample, live in enumerate(index):
        alive[sample, live] = True
    rule = mask.mask_mod

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine: Tensor = alive[b if len(index) > 1 else b * 0, k] | (q == k)
        result: Tensor = rule(b, h, q, k) & mine
        return result

    samples = batch if len(index) > 1 else None
    size = mask.BLOCK_SIZE
    return create_block_mask(visible, samples, None, keys, keys, device=str(alive.device), BLOCK_SIZE=size)
