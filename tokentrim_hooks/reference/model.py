"""A small block-causal video diffusion transformer that speaks Self-Forcing's cache protocol.

Shapes: ``B`` videos, ``F`` frames, ``C`` channels, ``H x W`` pixels, ``L`` tokens, ``n`` heads, ``d`` head width. A
frame is cut into patches of 4x4 pixels, one token each, in row-major order; tokens of a video are frame-major. There
is no text: prompt embeddings and the cross-attention cache are accepted, as callers of such models pass them, and
ignored.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokentrim_hooks.reference.tokens import patchify, rotary_table, rotate, scales, unpatchify

KVCache = list[dict[str, Tensor]]
"""A dict a layer: ``k`` and ``v`` [B, S, n, d]; ``global_end_index``, ``local_end_index`` LongTensor[1], in tokens."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from ``q`` [B, L, n, d] to all cached ``k`` and ``v`` [B, S, n, d]; returns [B, L, n, d].

    Cached self attention, and nothing else, calls this function through the module's global name, as models of the Wan
    family do; whoever wants to choose the keys replaces that name.
    """
    return _dot_product(q, k, v)


def _dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _training_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As :func:`_dot_product`, as two products and a softmax: trains twice as fast on a CPU as the fused kernel."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """Self attention over a rolling key-value cache, or over whole sequences for training.

    Attributes:
        local_attn_size: frames that a chunk sees, itself included; -1 for all.
        sink_size: first frames of the video that are never evicted.
        max_attention_size: the same window in tokens.
    """

    def __init__(self, dim: int, num_heads: int, frame_seqlen: int, local_attn_size: int, sink_size: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.frame_seqlen = frame_seqlen
        self.local_attn_size = local_attn_size
        self.sink_size = sink_size
        self.max_attention_size = sys.maxsize if local_attn_size == -1 else local_attn_size * frame_seqlen
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(self.head_dim, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        kv_cache: dict[str, Tensor] | None = None,
        current_start: int = 0,
        chunk: int = 0,
        copies: int = 0,
    ) -> Tensor:
        """Attend from tokens ``x`` [B, L, dim].

        With ``kv_cache``, ``x`` is one chunk whose first token has absolute index ``current_start``. Without, ``x`` is
        a whole video in chunks of ``chunk`` tokens, followed by ``copies`` noisy ones that see its earlier chunks.
        """
        q, k, v = self._project(x, table)
        if kv_cache is not None:
            mixed = self._attend_cached(q, k, v, kv_cache, current_start)
        else:
            (q, *noisy_q), (k, *noisy_k), (v, *noisy_v) = (part.chunk(1 + copies, dim=1) for part in (q, k, v))
            noisy = zip(noisy_q, noisy_k, noisy_v, strict=True)
            parts = [self._attend_blocks(q, k, v, k, v, chunk)]
            parts += [self._attend_blocks(own_q, own_k, own_v, k, v, chunk) for own_q, own_k, own_v in noisy]
            mixed = torch.cat(parts, dim=1)
        out: Tensor = self.o(mixed.flatten(2))
        return out

    def _project(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(2, (self.num_heads, self.head_dim)) for layer in (self.q, self.k, self.v))
        return rotate(self.norm_q(q), table).to(v.dtype), rotate(self.norm_k(k), table).to(v.dtype), v

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: dict[str, Tensor], current_start: int) -> Tensor:
        current_end = current_start + k.shape[1]
        local_end = self._make_room(cache, current_end, k.shape[1])
        # A second call for the same frames does not advance the end, so it rewrites the rows of the first.
        cache["k"][:, local_end - k.shape[1] : local_end] = k
        cache["v"][:, local_end - k.shape[1] : local_end] = v
        window = slice(max(0, local_end - self.max_attention_size), local_end)
        mixed = attention(q, cache["k"][:, window], cache["v"][:, window])
        cache["global_end_index"].fill_(current_end)
        cache["local_end_index"].fill_(local_end)
        return mixed

    def _make_room(self, cache: dict[str, Tensor], current_end: int, new: int) -> int:
        """Shift old rows out where the cache is full; returns the row behind the ones to write."""
        global_end, local_end = int(cache["global_end_index"].item()), int(cache["local_end_index"].item())
        evicted = new + local_end - cache["k"].shape[1]
        if self.local_attn_size != -1 and current_end > global_end and evicted > 0:
            sink = self.sink_size * self.frame_seqlen
            for rows in (cache["k"], cache["v"]):
                rows[:, sink : local_end - evicted] = rows[:, sink + evicted : local_end].clone()
            local_end -= evicted
        return local_end + current_end - global_end

    def _attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, chunk: int) -> Tensor:
        """Block-causal attention: each chunk sees itself in ``k`` and earlier chunks in ``past_k``.

        A loop over chunks with the keys that the rolling cache would hold equals the masked attention over the whole
        sequence, and on a CPU costs a third of it.
        """
        mixed = []
        for start in range(0, q.shape[1], chunk):
            own, past = slice(start, start + chunk), self._visible_past(start, chunk)
            keys = torch.cat([*(past_k[:, part] for part in past), k[:, own]], dim=1)
            values = torch.cat([*(past_v[:, part] for part in past), v[:, own]], dim=1)
            mixed.append(_training_attention(q[:, own], keys, values))
        return torch.cat(mixed, dim=1)

    def _visible_past(self, start: int, chunk: int) -> tuple[slice, ...]:
        sink = min(self.sink_size * self.frame_seqlen, start)
        oldest = start + chunk - self.max_attention_size + sink
        if oldest <= sink:
            return (slice(0, start),)
        return slice(0, sink), slice(oldest, start)


class CausalBlock(nn.Module):
    """Transformer block: self attention and a two-layer perceptron, both scaled and shifted by the timestep (AdaLN)."""

    def __init__(self, dim: int, attn: CausalSelfAttention, mlp_ratio: int) -> None:
        super().__init__()
        self.self_attn = attn
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x: Tensor, time: Tensor, **attn: Any) -> Tensor:
        """``x`` [B, L, dim], ``time`` [B, F, 6, dim]; returns [B, L, dim]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (time + self.modulation).to(x.dtype).unsqueeze(3).unbind(2)
        x = _modulated_add(x, self.self_attn(_modulate(self.norm1(x), shift1, scale1), **attn), gate1)
        return _modulated_add(x, self.ffn(_modulate(self.norm2(x), shift2, scale2)), gate2)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x`` [B, L, dim] with one ``shift`` and ``scale`` [B, F, 1, dim] a frame."""
    return torch.addcmul(shift, x.unflatten(1, (shift.shape[1], -1)), 1 + scale).flatten(1, 2)


def _modulated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    frames = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, frames), y.to(x.dtype).unflatten(1, frames), gate).flatten(1, 2)


class CausalVideoModel(nn.Module):
    """Predicts the flow (noise minus video) of noisy frames, chunk by chunk, from a rolling cache of earlier chunks.

    Args:
        dim, layers, heads, mlp_ratio: size of the transformer.
        grid: tokens of a frame, (height, width); a frame has four times as many pixels each way.
        local_attn_size, sink_size: window and sink in frames, see :class:`CausalSelfAttention`.
        num_frame_per_block: frames of a chunk.
        guidance: weight w of history in a cached call, ``alone + w (with history - alone)``; anything but 1 costs a
            second pass over the chunk alone, which has no cache and touches none.
    """

    def __init__(
        self,
        dim: int = 160,
        layers: int = 5,
        heads: int = 4,
        mlp_ratio: int = 3,
        channels: int = 3,
        grid: tuple[int, int] = (8, 8),
        local_attn_size: int = 21,
        sink_size: int = 0,
        num_frame_per_block: int = 3,
        guidance: float = 1.0,
    ) -> None:
        super().__init__()
        self.guidance = guidance
        self.dim, self.num_layers, self.num_heads, self.head_dim = dim, layers, heads, dim // heads
        self.patch_size = (1, 4, 4)
        self.in_dim, self.grid = channels, grid
        self.local_attn_size, self.num_frame_per_block = local_attn_size, num_frame_per_block
        self.frame_seqlen = grid[0] * grid[1]
        patch = channels * math.prod(self.patch_size)
        self.patch_embedding = nn.Linear(patch, dim)
        self.time_embedding = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            CausalBlock(dim, CausalSelfAttention(dim, heads, self.frame_seqlen, local_attn_size, sink_size), mlp_ratio)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        seq_len: int | None = None,
        kv_cache: KVCache | None = None,
        crossattn_cache: list[Any] | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
        clean_x: Tensor | None = None,
        aug_t: Tensor | None = None,
        frame_index: Tensor | None = None,
    ) -> Tensor:
        """Predict the flow of ``x`` [B, C, F, H, W] at timesteps ``t`` [B, F] (0 clean, 1000 noise); same shape as
        ``x``.

        With ``kv_cache``, ``x`` is one chunk starting at token ``current_start`` and the cache is written. Without,
        ``x`` is a whole video; ``clean_x`` (at timesteps ``aug_t``, default 0) is then what later chunks see of
        earlier ones (teacher forcing), and ``x`` may hold several noisy copies of that video, one after another.
        ``frame_index`` [F] says at which frames ``clean_x`` stands, default 0, 1, 2, ... ``context``, ``seq_len``,
        ``crossattn_cache`` and ``cache_start`` are part of the protocol and unused.
        """
        flow = self._flow(x, t, kv_cache, current_start, clean_x, aug_t, frame_index)
        if self.guidance == 1 or kv_cache is None or not current_start:
            return flow
        alone = self._flow(x, t)
        return alone + self.guidance * (flow - alone)

    def _flow(
        self,
        x: Tensor,
        t: Tensor,
        kv_cache: KVCache | None = None,
        current_start: int = 0,
        clean_x: Tensor | None = None,
        aug_t: Tensor | None = None,
        frame_index: Tensor | None = None,
    ) -> Tensor:
        frames = x.shape[2]
        hidden, time = self._embed(x, t), self._embed_time(t)
        copies = 0
        if clean_x is not None:
            copies, frames = frames // clean_x.shape[2], clean_x.shape[2]
            aug_t = torch.zeros_like(t[:, :frames]) if aug_t is None else aug_t
            hidden = torch.cat([self._embed(clean_x, aug_t), hidden], dim=1)
            time = torch.cat([self._embed_time(aug_t), time], dim=1)
        if frame_index is None:
            first = current_start // self.frame_seqlen
            frame_index = torch.arange(first, first + frames, device=x.device)
        if kv_cache is None and frames % self.num_frame_per_block:
            raise ValueError(f"{frames} frames are not whole chunks of {self.num_frame_per_block}; give a multiple")
        attn = self._attention_arguments(frame_index, current_start, copies)
        modulation = self.time_projection(time).unflatten(2, (6, self.dim))
        for index, block in enumerate(self.blocks):
            layer_cache = None if kv_cache is None else kv_cache[index]
            hidden = block(hidden, modulation, kv_cache=layer_cache, **attn)
        frames = x.shape[2]
        return self._unembed(hidden[:, -frames * self.frame_seqlen :], time[:, -frames:], x, t)

    def _attention_arguments(self, frame_index: Tensor, current_start: int, copies: int) -> dict[str, Any]:
        table = rotary_table(frame_index, self.grid, self.head_dim)
        if copies:
            table = (table[0].repeat(1 + copies, 1, 1), table[1].repeat(1 + copies, 1, 1))
        chunk = self.num_frame_per_block * self.frame_seqlen
        return {"table": table, "current_start": current_start, "chunk": chunk, "copies": copies}

    def _embed(self, x: Tensor, t: Tensor) -> Tensor:
        scaled = x * scales(x, t)[0]
        hidden: Tensor = self.patch_embedding(patchify(scaled, self.patch_size[1:]))
        return hidden

    def _embed_time(self, t: Tensor) -> Tensor:
        """Timesteps [B, F] to embeddings [B, F, dim]."""
        rate = torch.exp(-math.log(1000.0) * torch.arange(32, device=t.device) / 32)
        angle = t.float()[..., None] * rate
        weight = self.patch_embedding.weight
        embedded: Tensor = self.time_embedding(torch.cat([angle.cos(), angle.sin()], dim=-1).to(weight.dtype))
        return embedded

    def _unembed(self, hidden: Tensor, time: Tensor, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = self.head_modulation(time).unsqueeze(2).chunk(2, dim=-1)
        out = self.head(_modulate(self.norm(hidden), shift, scale))
        _, skip, gain = scales(x, t)
        return skip * x + gain * unpatchify(out, x.shape, self.patch_size[1:])
