"""Stream, an invented model that predicts a velocity and keeps its history in the sequence, and its adapter.

There is no cache. A call is given the last frames of the video, clean, and the noisy chunk, and attends over both; the
frames before the chunk are encoded anew every time. The sampler takes Euler steps along the velocity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokentrim_hooks import Adapter, Call, KeyLayout, Match, NoMatch, Patches, Phase, Role, Seen, Segment, lacks

LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)
CHUNK, TILE, CHANNELS = 2, (1, 2), 4


def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over ``[B, heads, length, width]``."""
    return F.scaled_dot_product_attention(query, key, value)


class Block(nn.Module):
    """Self attention over history and chunk, then a perceptron."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[B, tokens, dim]``."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(mix(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class StreamNet(nn.Module):
    """Predicts the velocity, noise minus clean, of the frames behind ``history``."""

    def __init__(self, dim: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.tile = TILE
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.embed, self.place = nn.Linear(CHANNELS * math.prod(TILE), dim), nn.Linear(4, dim)
        self.unembed = nn.Linear(dim, CHANNELS * math.prod(TILE))

    def forward(self, noisy: Tensor, history: Tensor, sigma: Tensor, frame: int) -> Tensor:
        """``noisy`` and ``history`` are ``[B, F, C, H, W]``; history ends before latent frame ``frame``."""
        video = torch.cat([history, noisy], dim=1)
        tiles = video.unflatten(4, (-1, TILE[1])).unflatten(3, (-1, TILE[0])).permute(0, 1, 3, 5, 4, 6, 2)
        axes = [torch.arange(n).float() for n in tiles.shape[1:4]]
        where = torch.stack(torch.meshgrid(axes[0] + frame - history.shape[1], *axes[1:], indexing="ij"), -1).sin()
        level = torch.where(torch.arange(len(axes[0])) >= history.shape[1], sigma, 0.0)
        place = torch.cat([where, level.view(-1, 1, 1, 1).expand(*where.shape[:3], 1)], dim=-1)
        x = (self.embed(tiles.flatten(4)) + self.place(place)).flatten(1, 3)
        for block in self.blocks:
            x = block(x)
        out = self.unembed(x).view(tiles.shape).permute(0, 1, 6, 2, 4, 3, 5).reshape(video.shape)
        return out[:, history.shape[1] :]


class Stream:
    """The pipeline."""

    def __init__(self, seed: int = 0, window: int = 6) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = StreamNet().eval().requires_grad_(False)
        self.window = window

    def generate(self, noise: Tensor) -> Tensor:
        """Turn noise ``[B, frames, C, H, W]`` into latents of the same shape, chunk by chunk."""
        video = noise[:, :0]
        for frame in range(0, noise.shape[1], CHUNK):
            chunk, history = noise[:, frame : frame + CHUNK], video[:, -self.window :]
            for sigma, lower in itertools.pairwise(LEVELS):
                velocity = self.net(chunk, history, torch.tensor(sigma), frame)
                chunk = chunk + (lower - sigma) * velocity
            video = torch.cat([video, chunk], dim=1)
        return video


class StreamAdapter(Adapter):
    """Keys of history, then of the chunk; x0 is made of the velocity, and a new x0 is said as one."""

    name = "stream"
    context_kind = "finished frames in the sequence"

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """A network that takes noisy frames beside their history."""
        net = getattr(model, "net", None)
        if not isinstance(net, nn.Module):
            return NoMatch("no pipeline with a .net module")
        reason = lacks(net, ("noisy", "history", "sigma", "frame"), "the network's forward")
        return NoMatch(reason) if reason else Match(net, net.tile)

    def attach(self, model: Any, patches: Patches) -> None:
        """All layers attend through the function ``mix`` of this module."""
        self.tile = model.net.tile
        patches.tap(globals(), "mix", q="query", k="key", v="value", heads_first=True)

    def parse(self, arguments: Mapping[str, Any]) -> Call:
        """Nothing is ever written: there is no cache."""
        return Call(
            arguments["noisy"],
            start=arguments["frame"],
            timestep=arguments["sigma"],
            commits=False,
            arguments=arguments,
        )

    def phase(self, call: Call, seen: Seen) -> Phase:
        """A chunk begins where the frame changes."""
        return Phase.REFINE if call.start == seen.start else Phase.FIRST

    def context(self, call: Call) -> KeyLayout:
        """Frames of history and of the chunk, in order."""
        height, width = (n // tile for n, tile in zip(call.latents.shape[-2:], self.tile, strict=True))
        history = range(call.start - call.arguments["history"].shape[1], call.start)
        parts = [(Role.CONTEXT, history), (Role.CURRENT, range(call.start, call.end))]
        return KeyLayout(tuple(Segment(role, frames, height, width) for role, frames in parts))

    def prediction(self, call: Call, output: Any) -> Tensor:
        """x0 = x - sigma v."""
        return call.latents - call.arguments["sigma"] * output

    def with_prediction(self, call: Call, output: Any, x0: Tensor) -> Tensor:
        """The velocity that leads from the sampler's own latents to another x0."""
        return (call.latents - x0) / call.arguments["sigma"]

    def carry_step(self, call: Call, earlier: Call, moved: Call, before: Tensor, after: Tensor) -> Tensor:
        """Euler: x' = r x + (1 - r) x0 with r = sigma' / sigma, so both x and x0 move x'."""
        ratio = call.arguments["sigma"] / earlier.arguments["sigma"]
        return call.latents + ratio * (moved.latents - earlier.latents) + (1 - ratio) * (after - before)
