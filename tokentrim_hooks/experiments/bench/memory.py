"""Peak memory of a rollout: of the CUDA allocator, or on a CPU of the tensors that operators returned."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORDS = {
    "cuda": "torch.cuda.max_memory_allocated, the model's weights included",
    "cpu": "bytes of tensors alive at once that operators returned during the rollout (weights and scratch space "
    "inside kernels excluded; the process's resident size is too coarse for this)",
}


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Peak of one rollout, in the words of WORDS."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    with Alive() as alive:
        run()
    peak: int = alive.peak
    return peak


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that come out of operators, takes them off when they die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        # What came in as an argument and was never counted is not made here: a weight, an input.
        key = storage._cdata
        if key in self._sizes or key in given:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
