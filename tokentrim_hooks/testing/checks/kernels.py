"""Other rows in the attention kernel: what a rewritten cache has to equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokentrim_hooks.testing.attention import Denoiser, KeyTracker, around_calls, signatures


@dataclass
class ShrunkRows:
    """How many rows were shrunk, all layers and calls together."""

    rows: int = 0


def shrunk(layer: int) -> float:
    """What rows of a layer are multiplied by: something else in each, so that layers cannot be taken for another."""
    return 1 / (2 + layer)


@contextmanager
def shrunk_rows(denoisers: Sequence[Denoiser], chunk: int) -> Iterator[ShrunkRows]:
    """Shrink K and V of the rows that a chunk's last call wrote, in every later kernel call that reads them."""
    log = ShrunkRows()
    mode = _Shrinking(chunk, log)
    with around_calls(denoisers, mode.enter, mode.leave), mode:
        yield log


@dataclass
class _Calls:
    """Depth of denoiser calls, and the ordinal of the next kernel call within the outermost."""

    depth: int = 0
    layer: int = 0
    trackers: dict[int, KeyTracker] = field(default_factory=dict)


class _Shrinking(TorchFunctionMode):
    def __init__(self, chunk: int, log: ShrunkRows) -> None:
        super().__init__()
        self.chunk, self.log, self.calls = chunk, log, _Calls()

    def enter(self) -> None:
        self.calls.depth, self.calls.layer = self.calls.depth + 1, 0

    def leave(self) -> None:
        self.calls.depth -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.calls.depth or getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)),
                 **kwargs}  # fmt: skip
        factor = self._factors(given["value"])
        return func(**{**given, "key": given["key"] * factor, "value": given["value"] * factor})

    def _factors(self, value: Tensor) -> Tensor:
        """What keys are multiplied by, 1 for those that stay as they are: ``[keys, 1]``."""
        rows = signatures(value)
        trackers = self.calls.trackers
        tracker = trackers.setdefault(self.calls.layer, KeyTracker())
        below = [of for of, other in trackers.items() if of < self.calls.layer and len(other.chunks) > self.chunk]
        self.calls.layer += 1
        tracker.see(rows)
        chosen = set(tracker.chunks[self.chunk]) if len(tracker.chunks) > self.chunk else set()
        marks = torch.tensor([row in chosen for row in rows], device=value.device)
        self.log.rows += int(marks.sum())
        return torch.where(marks, shrunk(len(below)), 1.0).to(value.dtype)[:, None]
