"""The conformance kit on diffusers' pipelines whose context lies in the sequence; SkyReels-V2 has a file of its own.

Seven chunks each, on a grid that is not square. References count frames by hand, in dispatch_tools' kernel.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import accumulate

import anyflow_tiny
import framepack_tiny
import helios_tiny
import ltx_tiny
import torch
from dispatch_tools import dead_keys, watched
from framepack_waits import FramePackWaits
from tokentrim_hooks_adapters.anyflow_far import AnyFlowFAR
from tokentrim_hooks_adapters.framepack import FramePack
from tokentrim_hooks_adapters.helios import Helios
from tokentrim_hooks_adapters.ltx_long import LTXLong
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from video_checks import Clock

from tokentrim_hooks.testing import AdapterConformance, not_checked

GRID, COUNT = (4, 6), 24


class Kit(AdapterConformance):
    """``dead(chunk, keys)`` gives the dead keys of a kernel call, or None for a call that is none of ours."""

    chunks, chunk_to_prune, late_chunk = 7, 2, 5
    tokens = (0, 5, 9)

    def clock(self):
        return Clock()

    def kernel(self, hide):
        return watched(hide)

    def reference(self, model, seed):
        clock = self.clock()

        def hide(keys, *more):
            dead = self.dead(clock.chunk, keys, *more) if clock.chunk >= self.chunk_to_prune else None
            return None if dead is None else torch.tensor(dead)

        with clock.on(model), self.kernel(hide):
            return self.sample(model, seed)

    def run(self, model, seed):
        return self.sample(model, seed)


class Packed(Kit):
    """Three frames a chunk; history in the order of the model at three scales, and a pinned frame that is spared."""

    tail = 3 * COUNT

    def dead(self, chunk, keys):
        line, old = self.line(chunk)
        coarse, fine = [(line[0], 4), (line[1], 2)], [(line[2], 1)]

        def gone(frame):
            return set(self.tokens) if old(frame) else set()

        packed = dead_keys(coarse, GRID, gone, "any")
        dead = packed + [False] * COUNT + dead_keys(fine, GRID, gone, "any") + [False] * self.tail
        return dead if keys == len(dead) else None

    def forwards(self, chunk, given):
        line = ([None] * 19 + list(range(given + 3 * chunk)))[-19:]
        limit = given + 3 * self.chunk_to_prune
        return (line[:16], line[16:18], line[18:]), lambda frame: frame < limit


class TestHelios(Packed):
    adapter = Helios

    def make_model(self):
        return helios_tiny.pipeline()

    def sample(self, model, seed):
        return helios_tiny.run(model, seed, chunks=self.chunks, size=(64, 96))

    def line(self, chunk):
        return self.forwards(chunk, 0)


class TestFramePack(FramePackWaits, Packed):
    adapter = FramePack
    tail = 3 * COUNT + 6
    sampling = "vanilla"

    def clock(self):
        return Clock("prepare_latents")

    def make_model(self):
        return framepack_tiny.pipeline()

    def sample(self, model, seed):
        return framepack_tiny.run(model, seed, sections=self.chunks, size=(64, 96), sampling=self.sampling)

    def line(self, chunk):
        return self.forwards(chunk, 1)


class TestFramePackBackwards(TestFramePack):
    """The last section is made first; history has the latest section first, and its frames in order of time."""

    sampling, backwards = "inverted_anti_drifting", True

    def line(self, chunk):
        line = ([(section, f) for section in range(chunk - 1, -1, -1) for f in range(3)] + [None] * 19)[:19]
        return (line[3:], line[1:3], line[:1]), lambda frame: frame[0] < self.chunk_to_prune


class TestLTX(Kit):
    """Windows of five frames, two of them the tail of the window before; only that tail is context."""

    adapter = LTXLong
    overlap = 2

    def make_model(self):
        return ltx_tiny.pipeline()

    def sample(self, model, seed):
        rng = torch.Generator().manual_seed(3)
        pinned = torch.randn(1, ltx_tiny.CHANNELS, 1, *GRID, generator=rng)
        return ltx_tiny.run(model, windows=self.chunks, seed=seed, width=192, negative_index_latents=pinned)

    def delivered(self, result):
        raise not_checked("every window is brought to the first one's mean and deviation, and joined to its neighbour")

    def dead(self, chunk, keys):
        if chunk != self.chunk_to_prune or keys < 8 * COUNT:
            return None
        return [False] * 5 * COUNT + [token in self.tokens for token in range(COUNT)] * 2 + [False] * COUNT


@contextmanager
def dense(hide=None):
    """Flex attention by torch's other kernel, which the kit watches, and a dense mask."""
    original = flex_attention.flex_attention

    def attention(query, key, value, score_mod=None, block_mask=None, scale=None, **options):
        seen = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        if block_mask is not None:
            seen = flex_attention.create_mask(block_mask.mask_mod, len(query), 1, *seen.shape[2:], device="cpu")
        dead = hide(key.shape[2], block_mask is not None) if hide is not None else None
        if dead is not None:
            own = torch.eye(*seen.shape[2:], dtype=torch.bool) & (block_mask is not None)
            seen = seen & (~dead | own)
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)

    flex_attention.flex_attention = attention
    try:
        yield
    finally:
        flex_attention.flex_attention = original


class TestAnyFlow(Kit):
    """A first frame, then chunks of two: the last two are in full, those before compressed two by two."""

    adapter = AnyFlowFAR
    partition = (1, *[2] * 6)
    starts = (0, *accumulate(partition))

    def kernel(self, hide):
        return dense(hide)

    def run(self, model, seed):
        with dense():
            return self.sample(model, seed)

    def make_model(self):
        return anyflow_tiny.pipeline()

    def sample(self, model, seed):
        rng = torch.Generator().manual_seed(seed)
        return anyflow_tiny.run(model, chunk_partition=list(self.partition), width=96, generator=rng)

    def dead(self, chunk, keys, writes):
        packed = self.starts[max(chunk + 1 - (2 if writes else 3), 0)]

        def gone(frame):
            return set(self.tokens) if frame < self.starts[self.chunk_to_prune] else set()

        line = [key for frame in range(packed) for key in dead_keys([([frame], 2)], GRID, gone, "any")]
        line += dead_keys([(range(packed, self.starts[chunk + 1]), 1)], GRID, gone, "any")
        queries = len(line) if writes else COUNT * (self.starts[chunk + 1] - self.starts[chunk])
        line += [False] * (math.ceil(queries / 128) * 128 - queries)
        assert keys == len(line)
        return line
