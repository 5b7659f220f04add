"""Rolling Forcing (TencentARC/RollingForcing): a window of blocks, each noisier than the one before, rolls over time.

A generator call denoises all blocks of the window at once; ``timestep`` ``[B, F]`` tells how noisy each frame is. A
block enters as pure noise at the end of the window and leaves clean at its start; the last windows of a video take none
in. Every call writes the first block of the window into the cache; a second call with ``updating_cache=True`` and that
block alone writes it clean. Blocks in flight are in the attention sequence only. The first block of the cache is an
anchor, kept before RoPE and placed anew in every call; the rows behind it are recent context, kept after RoPE.

The chunk that is judged is the one that enters. Its context are the clean blocks in the cache: the first can be pruned
for chunk 6, once the block behind the anchor has left the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokentrim_hooks import Adapter, CacheRows, Call, Phase, Seen, hookimpl

from ._wan import CausalWan, history_rows, start_of, values_of


class RollingForcing(CausalWan):
    """Rolling-window rollout of ``inference_rolling_forcing``.

    ``reference_chunk`` says what a block is compared with when it enters. ``"window"``: the block before it, as
    predicted in the same call; it adjoins in time, as in the paper, but is one denoising step old. ``"clean"``: the
    latest clean block; it is finished, but lies as many blocks back as the window is long, so that motion counts as
    drift. Set it on a subclass or on the class.
    """

    name = "rolling-forcing"
    models = ("Rolling Forcing",)
    context_kind = "rolling KV cache, K after RoPE, behind an anchor before RoPE; window in flight"
    constructors = ("pipeline.rolling_forcing_inference:CausalInferencePipeline",)
    takes = frozenset({"judge", "hide", "commit", "weigh"})
    own = ("updating_cache",)
    layer_attributes = ("block_length", "frame_length")

    reference_chunk: ClassVar[Literal["window", "clean"]] = "window"

    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Read one generator call as one of the window's newest block."""
        if arguments["kv_cache"] is None:
            return None
        self.require_own_forward()
        self.require_entries(arguments["kv_cache"])
        window: Tensor = arguments["noisy_image_or_video"]
        latents = window[:, -self._block_frames() :]
        first = start_of(arguments) // self.rows_per_frame(window)
        return Call(
            latents,
            start=first + window.shape[1] - latents.shape[1],
            stream=values_of(arguments["kv_cache"]),
            timestep=arguments["timestep"][:, -latents.shape[1] :],
            commits=bool(arguments["updating_cache"]),
            arguments=arguments,
        )

    def phase(self, call: Call, seen: Seen) -> Phase:
        """A block enters where the window ends at other frames than before; ``updating_cache`` commits."""
        if call.commits:
            return Phase.COMMIT
        return Phase.REFINE if call.start == seen.start else Phase.FIRST

    def context(self, call: Call) -> CacheRows:
        """Rows behind the anchor and before the window's first block, the only one that a call writes."""
        self.require_entries(call.arguments["kv_cache"])
        anchor, per_frame = int(self.layers[0].block_length), self.rows_per_frame(call.latents)
        rows = history_rows(call.arguments, anchor, per_frame, anchor)
        # The window in flight begins here; the call's own block is its last one.
        return replace(rows, end=start_of(call.arguments) // per_frame)

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 of the newest block."""
        x0: Tensor = output[-1]
        return x0[:, -call.frames :]

    def in_flight(self, call: Call, output: Any) -> Tensor | None:
        """x0 of the block before it, which is still being denoised; None to compare with the latest clean block."""
        x0: Tensor = output[-1]
        if self.reference_chunk == "clean" or x0.shape[1] <= call.frames:
            return None
        return x0[:, -2 * call.frames : -call.frames]

    def _block_frames(self) -> int:
        layer = self.layers[0]
        return int(layer.block_length) // int(layer.frame_length)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """Built-in adapter for Rolling Forcing."""
    return [RollingForcing]
