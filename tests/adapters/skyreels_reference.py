"""What the SkyReels-V2 tests share: run settings, a forced verdict, and an -inf reference that asks no adapter.

Latent frames, windows and step rows are written out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_skyreels_v2 as upstream
from PIL import Image

from tests.adapters import skyreels_tiny as tiny
from tokentrim_hooks import Policy, Verdict

torch.set_num_threads(1)
N = tiny.TOKENS
DEAD = (1, 6, 11)
"""Tokens that the forced verdicts prune."""

# Windows of a long synchronous video: frames 0-4, then (2 3 4) 5 6, then (4 5 6) 7 8; prefixes in brackets.
SYNC = {"num_frames": 33, "base_num_frames": 17, "overlap_history": 9}
# Causal blocks of 2: frames (0 1) (2 3) (4 5) staggered by one row, then the prefix 3 4 5 is truncated to 3 4,
# so that the second window generates 5 again (thrown away, numbered 6) with 6 (numbered 7), then 7 8 (8 9).
BLOCKS = {"num_frames": 33, "base_num_frames": 21, "overlap_history": 9, "ar_step": 1, "causal_block_size": 2}
# One frame a block and no causal mask: in-flight frames and frames that have not begun see each other.
LONELY = {"num_frames": 17, "base_num_frames": 13, "overlap_history": 5, "ar_step": 2, "causal_block_size": 1}
SHORT = {"num_frames": 13, "overlap_history": None}


@dataclass(frozen=True)
class Forced(Policy):
    """Prunes ``tokens`` at one chunk, in the samples named."""

    chunk: int
    tokens: tuple[int, ...] = DEAD
    samples: tuple[int, ...] = (0, 1)

    def judge(self, chunk, history):
        drift = chunk.drift
        batch = drift.shape[0]
        tokens = torch.tensor([self.tokens] * batch)
        prune = torch.tensor([chunk.index == self.chunk and b in self.samples for b in range(batch)])
        severity = drift.gather(1, tokens).mean(1)
        return Verdict(tokens, severity, torch.zeros(batch), prune)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def given(kind: str) -> dict[str, Any]:
    clip = [picture(i) for i in range(9)]
    return {"text": {}, "image": {"image": clip[0]}, "video": {"video": clip}}[kind]


def watched(handle: Any, method: str, notes: list[Any]) -> None:
    """Note (start, result) of an adapter's method."""
    original = getattr(handle.adapter, method)

    def noting(call, *output):
        result = original(call, *output)
        notes.append((call.start, result if result is None or not torch.is_tensor(result) else result.clone()))
        return result

    setattr(handle.adapter, method, noting)


Hide = Callable[[int, int], dict[int, Any]]
"""(window, row) -> {key column: query columns from which its DEAD tokens are hidden, or ALL}."""
ALL = range(1000)


def hidden_mask(frames: int, hide: dict[int, Any], tokens: tuple[int, ...] = DEAD) -> torch.Tensor:
    """BoolTensor [L, L], True where a query must not see a key, by frame and position arithmetic."""
    mask = torch.zeros(frames * N, frames * N, dtype=torch.bool)
    for key, queries in hide.items():
        for query in range(frames):
            if query in queries:
                for token in tokens:
                    mask[query * N : (query + 1) * N, key * N + token] = True
    return mask


class InfReference:
    """The unpatched pipeline with -inf at the dead keys of every self-attention call, put in by the test."""

    def __init__(self, monkeypatch, pipe: Any, hide: Hide, tokens: tuple[int, ...] = DEAD) -> None:
        self.window, self.row, self.hide, self.hidden = -1, -1, hide, 0
        self.last: Any = None
        prepare, original = pipe.prepare_latents, upstream.dispatch_attention_fn

        def prepare_latents(*args, **kwargs):
            self.window, self.row = self.window + 1, -1
            return prepare(*args, **kwargs)

        def dispatch(query, key, value, attn_mask=None, **kwargs):
            if query.shape[1] != key.shape[1]:
                return original(query, key, value, attn_mask=attn_mask, **kwargs)
            dead = hidden_mask(key.shape[1] // N, self.hide(self.window, self.row), tokens)
            self.hidden += int(dead.any())
            bias = torch.zeros(dead.shape).masked_fill(dead, -torch.inf)
            if attn_mask is not None:
                bias = bias.masked_fill(~attn_mask[0, 0], -torch.inf)
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

        def count(_module, _args, kwargs):
            # Guidance calls twice with one input object.
            self.row += kwargs["hidden_states"] is not self.last
            self.last = kwargs["hidden_states"]

        monkeypatch.setattr(pipe, "prepare_latents", prepare_latents)
        monkeypatch.setattr(upstream, "dispatch_attention_fn", dispatch)
        pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)


def reference_run(monkeypatch, hide: Hide, **settings) -> torch.Tensor:
    with monkeypatch.context() as patch:
        pipe = tiny.pipeline()
        reference = InfReference(patch, pipe, hide)
        video = tiny.run(pipe, **settings)
        assert reference.hidden
    return video


def sync_prune(window: int, row: int) -> dict[int, Any]:
    """Chunk 1 (frames 5 6) is pruned: all its prefix; frame 4 comes back as column 0 of the next window."""
    return {1: {0: ALL, 1: ALL, 2: ALL}, 2: {0: ALL}}.get(window, {})


def sync_prune_once(window: int, row: int) -> dict[int, Any]:
    return sync_prune(window, row) if window == 1 else {}


def block_prune(window: int, row: int) -> dict[int, Any]:
    """Chunk 2 (frames 4 5, begins at row 2) is pruned.

    Frames 0 1 are denoised in rows 0-2 and 2 3 in rows 1-3: until then only the chunk pruned for loses them.
    In the second window column 0 is frame 3.
    """
    late = range(4, 6)
    rows = {
        2: {0: late, 1: late, 2: late, 3: late},
        3: {0: ALL, 1: ALL, 2: late, 3: late},
        4: {0: ALL, 1: ALL, 2: ALL, 3: ALL},
    }
    return rows.get(row, {}) if window == 0 else {0: ALL}


def lonely_prune(window: int, row: int) -> dict[int, Any]:
    """Chunk 1 (frame 1, begins at row 2) is pruned; frame 0 is denoised in rows 0-2. Columns 2 and 3 sleep."""
    if window == 0 and row >= 2:
        return {0: range(1, 4) if row == 2 else ALL}
    return {}
