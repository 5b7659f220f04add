"""Which frames a call reads, and attention over those of their rows that live.

A session's rows lie in pages of a pool that all sessions share, a page a frame, and a block table names the pages that
a call reads, in the order of frames. So nothing is marked in the pool: whole frames are left out of the table, and of
frames of which single rows are dead the kernel is given pages of what is left. It is vLLM-Omni's own either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks import CallTap, Role, UnsupportedContextError

PAGED, WRITE = "ar_diffusion_paged_attention", "paged_write_attn"
FIELDS = ("value", "end", "last_start")


@dataclass(frozen=True)
class Window:
    """The frames that a call reads, its own included, oldest first; the first ``sinks`` of them are a sink.

    ``owner`` is what the calls of one video have in common: V of a request's first layer, or a session's request for
    pages. ``pages`` is vLLM-Omni's context of the call, where it reads pages.
    """

    owner: Any
    frames: tuple[int, ...]
    sinks: int
    pages: Any = None

    @classmethod
    def of(cls, layer: Any, own: range, per_frame: int, sinks: int) -> Window:
        """Of a call that writes the frames ``own``, by the cache of its first layer.

        Raises:
            UnsupportedContextError: it is no cache that we know, or its pages are no frames.
        """
        pages = getattr(layer, "forward_ctx", None)
        if pages is not None:
            _require_frames(pages, per_frame)
            owner, held, room = pages.adapter, len(pages.history_block_ids), pages.max_video_tokens // per_frame
            sinks = int(pages.kv_cache.spec.sink_chunks)
        else:
            _require_cache(layer)
            written = len(own) if layer.last_start == own.start * per_frame else 0
            owner, held, room = layer.value, layer.end // per_frame - written, layer.value.shape[1] // per_frame
        kept = min(sinks, held)
        frames = (*range(kept), *range(own.start - held + kept, own.stop))
        if len(frames) > room:
            frames = (*frames[:sinks], *frames[len(frames) - room + sinks :])
        return cls(owner, frames, sinks, pages)

    def parts(self, start: int) -> list[tuple[Role, tuple[int, ...]]]:
        """The frames by what they are to the chunk at latent frame ``start``."""
        old = sum(frame < start for frame in self.frames)
        sinks = min(self.sinks, old)
        cuts = (self.frames[:sinks], self.frames[sinks:old], self.frames[old:])
        return list(zip((Role.ANCHOR, Role.CONTEXT, Role.CURRENT), cuts, strict=True))

    def require(self, rows: int) -> None:
        """Raise UnsupportedContextError where the call has been made, and has read another number of rows."""
        read = getattr(self.pages, "kv_len", 0)
        if read not in (0, rows):
            raise UnsupportedContextError(
                f"the session's call has read {read} rows, and {rows} were expected, so nothing is pruned.\n"
                "Leave the plugin out of this version: it knows the pages of vLLM-Omni 0.30.0."
            )


class Pages:
    """vLLM-Omni's attention over pages, of live rows only."""

    def __init__(self, paged: Callable[..., Tensor]) -> None:
        self._paged = inspect.unwrap(paged)  # without the taps of other models of this module
        self._whole: tuple[Tensor | None, Tensor | None] = (None, None)

    def attend(
        self, tap: CallTap, attention: Callable[..., Tensor], query: Tensor, keys: Tensor, values: Tensor, **given: Any
    ) -> Tensor:
        """Stand in for the kernel, which on CUDA reads a single request's rows as pages, one behind the other."""
        live = _live(tap, keys)
        if live is None:
            return attention(query, keys, values, **given)
        rows = (pages.flatten(0, 1).index_select(0, live) for pages in (keys, values))
        return self._over(query, *rows, size=keys.shape[1], **given)

    def write_and_attend(
        self,
        tap: CallTap,
        attention: Callable[..., Tensor],
        inputs: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
    ) -> Tensor:
        """Stand in for a session's attention, which writes the chunk's rows into their pages first."""
        live, size = _live(tap, inputs.block_table), inputs.block_size
        if live is None or inputs.stage_key is not None:
            # A staged copy of the window is read by later calls: it is made as ever, whatever is left out here.
            whole = attention(inputs, query, key, value, *rest)
            if live is None:
                return whole
        pages = self._whole_pages(live, size)
        if pages is not None:
            table = torch.zeros_like(inputs.block_table)
            table[0, : len(pages)] = inputs.block_table[0, pages]
            left = {"block_table": table, "seq_lens": torch.full_like(inputs.seq_lens, live.numel())}
            unstaged = {"stage_key": None, "stage_value": None, "reuse_history": False}
            return attention(inputs._replace(**left, **unstaged), query, key, value, *rest)
        slots = inputs.block_table[0, live // size].long() * size + live % size
        for pool, rows in ((inputs.key_pool, key), (inputs.value_pool, value)):
            pool[inputs.video_slots] = rows.to(pool.dtype)
        given = {name: getattr(inputs, name) for name in ("query_start_loc", "seq_lens", "max_query_len")}
        rows = (pool.index_select(0, slots) for pool in (inputs.key_pool, inputs.value_pool))
        return self._over(query, *rows, size=size, softmax_scale=rest[-1], **given)

    def _over(self, query: Tensor, keys: Tensor, values: Tensor, *, size: int, **given: Any) -> Tensor:
        """The kernel over rows ``[length, heads, head_dim]``, laid out as pages; the last one may be part empty."""
        count = -(-len(keys) // size)
        table = torch.arange(count, dtype=torch.int32, device=keys.device)[None]
        laid = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, count * size - len(x))) for x in (keys, values))
        paged = (rows.unflatten(0, (count, size)) for rows in laid)
        filled = torch.full_like(given["seq_lens"], len(keys))
        return self._paged(query, *paged, **{**given, **_table(table, filled, count * size)})

    def _whole_pages(self, live: Tensor, size: int) -> Tensor | None:
        """Which pages are left, where none has lost single rows; else None. The same for all layers of a call."""
        if self._whole[0] is not live:
            pages = live.view(-1, size) if live.numel() % size == 0 else None
            if pages is not None:
                first = pages[:, :1] // size
                in_turn = first * size + torch.arange(size, device=live.device)
                pages = first[:, 0] if torch.equal(pages, in_turn) else None
            self._whole = (live, pages)
        return self._whole[1]


def _table(table: Tensor, rows: Tensor, most: int) -> dict[str, Any]:
    return {"block_table": table, "seq_lens": rows, "max_seq_len": most}


def _live(tap: CallTap, like: Tensor) -> Tensor | None:
    """The live ones of all rows that the call reads; None if all live."""
    layout = tap.layout
    assert layout is not None, "context() answers a layout"
    return tap.live_range(layout.segments[-1].frames[0], 0, layout.length, like.new_empty(layout.length))


def _require_frames(pages: Any, per_frame: int) -> None:
    if pages.block_size != per_frame:
        raise UnsupportedContextError(
            f"a page of the session holds {pages.block_size} rows, a frame has {per_frame}, so nothing is pruned.\n"
            "Use single requests, or pages that are frames, which the plugin knows."
        )


def _require_cache(layer: Any) -> None:
    if missing := [name for name in FIELDS if not hasattr(layer, name)]:
        raise UnsupportedContextError(
            f"the KV cache is a {type(layer).__name__} without {', '.join(missing)}, so nothing is pruned.\n"
            "Give each call a cache of its own, as vLLM-Omni's block runner does."
        )
