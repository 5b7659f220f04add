"""Krea's realtime-video (krea-ai/realtime-video): Self-Forcing's generator behind a server with a loop of its own.

The server commits nothing. Before every block it empties the cache and fills it again in one call, from the first frame
and the latest finished ones, under ``model.block_mask``; then it denoises. ``current_start`` stands still once the
window is full. So the filling call is read as the commit of the block before, and blocks are counted here.

Pruned tokens are dead for the block that they were pruned for, whatever the policy's ``persist``: the next filling
brings them back, and does not go through the attention function that is tapped. The first frame is an anchor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokentrim_hooks import Adapter, CacheRows, Call, hookimpl

from .self_forcing import SelfForcing


class KreaRealtime(SelfForcing):
    """Rollout of ``release_server.py`` and of ``CausalInferencePipeline``, whose loop is Self-Forcing's.

    A session that goes on from given latents cannot be told from the one before: call ``handle.reset()`` in between.
    """

    name = "krea-realtime"
    models = ("Krea realtime-video",)
    context_kind = "KV cache filled anew for every block, K after RoPE"
    takes = frozenset({"judge", "hide", "correct", "guide", "weigh"})
    """The server's commits fill the whole cache anew: there is no row to hide from them, and none that stays."""
    structure = "fuse_projections"

    end, frames, shift = 0, 0, 0
    """Frames of the video so far, frames of the latest block, and how far ``current_start`` lags behind."""
    filled = False
    """Whether the cache was filled since the latest denoising call."""
    serves = False
    """Whether the cache is filled by the server's loop."""

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one generator call; frames are counted where ``current_start`` stands still."""
        call = super().parse(arguments)
        if call is None:
            return None
        if getattr(self.generator.model, "block_mask", None) is not None:
            return self._filling(call)
        if self.filled or call.start == 0:
            self.shift = self.end - call.start if self.filled else 0
        self.serves = self.serves and call.start > 0
        self.filled = False
        self.end, self.frames = call.end + self.shift, call.frames
        return dataclasses.replace(call, start=call.start + self.shift)

    def _filling(self, call: Call) -> Call:
        """The call that fills the cache: it commits the latest block, or hands in what a session begins with."""
        self.filled = self.serves = True
        if not self.end:
            self.end = self.frames = call.frames
        latents = call.latents[:, -self.frames :]
        return dataclasses.replace(call, latents=latents, start=self.end - latents.shape[1], commits=True)

    def context(self, call: Call) -> CacheRows:
        """As Self-Forcing; of a filled cache the first frame is an anchor."""
        rows = super().context(call)
        anchors = max(rows.anchors, min(rows.rows_per_frame, rows.stop) if self.serves else 0)
        return dataclasses.replace(rows, anchors=anchors)

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 of the newest block, where the cache is filled the last of several."""
        x0: Tensor = output[-1]
        return x0[:, -call.frames :]


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for Krea's realtime-video."""
    return [KreaRealtime]
