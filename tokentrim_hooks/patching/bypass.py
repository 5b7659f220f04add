"""Calls of a denoiser's ``forward``, which run none of its hooks: heard by its parts until it is called itself.

A loop of the user's own may say ``model.forward(...)``. Nothing of such a call is judged or pruned, and nothing of ours
hears of it. So the parts of a denoiser have hooks, too, which come off at its first call that is seen, before anything
is compiled; a loop that makes its calls in both ways is not told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn

from tokentrim_hooks.patching.callers import method_of
from tokentrim_hooks.patching.hooks import Switch, drop_hooks, plain_hooks


class Bypass:
    """Hears whether a denoiser's ``forward`` runs while the denoiser was never called.

    Args:
        patch: says whether the patch is on. denoisers: of the model. tell: called with its class's name, once.

    Attributes:
        heard: whether it did.
    """

    def __init__(self, patch: Switch, denoisers: Iterable[object], tell: Callable[[str], None]) -> None:
        self._patch, self._tell, self.heard = patch, tell, False
        self._denoisers = [denoiser for denoiser in denoisers if isinstance(denoiser, nn.Module)]
        self._parts = [part for denoiser in self._denoisers for part in _parts_of(denoiser)]
        for part in self._parts:
            plain_hooks(part, self._hear, None, None, self)

    @property
    def active(self) -> bool:
        """Whether the hooks of the parts have work to do."""
        return bool(self._parts) and self._patch.active

    def off(self) -> None:
        """Take the hooks off: the denoiser itself was called, or the patch comes off."""
        parts, self._parts = self._parts, []
        for part in parts:
            drop_hooks(part, self)

    def _hear(self, _part: nn.Module, _args: Any, _kwargs: Any) -> None:
        name = next((type(owner).__name__ for owner in _running() if any(owner is d for d in self._denoisers)), "")
        if name and not self.heard:
            self.heard = True
            self._tell(name)


def _parts_of(denoiser: nn.Module) -> Iterator[nn.Module]:
    """What it may call itself: its parts, and the first one of each list of parts."""
    for part in denoiser.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from list(part.children())[:1]
        yield part


def _running() -> Iterator[object]:
    """Whose ``forward`` is running, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            yield method_of(frame)
        frame = frame.f_back


def bypassed(name: str) -> str:
    """What is wrong with a call of the ``forward`` of a denoiser of this ``name``, and what to do."""
    return (
        f"tokentrim was patched in, but the forward of {name} was called directly, which runs no hooks: nothing of "
        "such calls is judged or pruned.\nCall it as denoiser(...), not as denoiser.forward(...)."
    )
