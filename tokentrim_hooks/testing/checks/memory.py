"""How much memory tensors hold, so that a test can tell what somebody has kept."""

from __future__ import annotations

import gc

import torch
from torch import Tensor


def held(besides: tuple[Tensor, ...] = ()) -> int:
    """Bytes that the tensors of this process hold, each memory counted once, those of ``besides`` left out."""
    gc.collect()
    left_out = {tensor.untyped_storage().data_ptr() for tensor in besides}
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    sizes = {memory.data_ptr(): memory.nbytes() for memory in map(_memory, tensors) if memory is not None}
    return sum(size for place, size in sizes.items() if place not in left_out)


def _memory(tensor: Tensor) -> torch.UntypedStorage | None:
    """A tensor's memory; None for one that has none of its own (sparse, fake)."""
    try:
        memory = tensor.untyped_storage()
        # A fake tensor, as torch.compile leaves some behind, has a storage without an address; one on "meta" has 0.
        return memory if memory.data_ptr() else None
    except (NotImplementedError, RuntimeError):
        return None
