"""Loom, an invented model whose layers attend over time at every site apart, and its adapter.

A layer has two attentions. The spatial one sees the tokens of one frame, and no history. The temporal one sees the
history of one site: its cache is ``[B * sites, frames, heads, width]``, so that space is folded into the batch. Both
call torch's kernel inside their own forward. The sampler is the few-step one: predict x0, add noise again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokentrim_hooks import Adapter, CacheRows, Call, Match, NoMatch, Patches, lacks

LEVELS = (1.0, 0.7, 0.4)
CHUNK, TILE, CHANNELS = 2, (2, 1), 4


class Attention(nn.Module):
    """Attention over ``[groups, length, dim]``; with a cache also over what that holds."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None, write: int = 0) -> Tensor:
        """With ``write`` the keys and values are kept, the latest ``write`` frames of them."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        if cache:
            k, v = torch.cat([cache["k"], k], dim=1), torch.cat([cache["v"], v], dim=1)
        if cache is not None and write:
            cache.update(k=k[:, -write:].contiguous(), v=v[:, -write:].contiguous())
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Space, then time, then a perceptron."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.space, self.time = Attention(dim), Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, cache: dict[str, Tensor], write: int) -> Tensor:
        """``x`` is ``[B, frames, sites, dim]``."""
        batch, frames = x.shape[:2]
        x = x + self.space(self.norm1(x).flatten(0, 1)).unflatten(0, (batch, frames))
        sites = self.norm2(x).transpose(1, 2).flatten(0, 1)
        x = x + self.time(sites, cache, write).unflatten(0, (batch, -1)).transpose(1, 2)
        return x + self.mlp(x)


class LoomNet(nn.Module):
    """Predicts the clean chunk; ``caches`` are one dict per layer, empty at first."""

    def __init__(self, dim: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.tile = TILE
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        size = CHANNELS * TILE[0] * TILE[1]
        self.embed, self.unembed, self.place = nn.Linear(size, dim), nn.Linear(dim, size), nn.Linear(4, dim)

    def forward(
        self, video: Tensor, level: Tensor, caches: list[dict[str, Tensor]], frame: int, keep: int = 0
    ) -> Tensor:
        """``video`` ``[B, F, C, H, W]`` at noise ``level`` ``[B]``; with ``keep`` its keys are cached."""
        (down, across), (height, width) = self.tile, video.shape[-2:]
        tiles = video.unflatten(4, (-1, across)).unflatten(3, (-1, down)).permute(0, 1, 3, 5, 4, 6, 2)
        rows, columns = torch.meshgrid(torch.arange(height // down), torch.arange(width // across), indexing="ij")
        where = torch.stack([rows, columns], -1).flatten(0, 1).float()
        times = torch.arange(frame, frame + video.shape[1]).float()[:, None, None].expand(-1, len(where), 1)
        where = torch.cat([where.expand(len(times), -1, -1), times], dim=-1).sin().expand(len(video), -1, -1, -1)
        place = torch.cat([where, level.view(-1, 1, 1, 1).expand(*where.shape[:3], 1)], dim=-1)
        x = self.embed(tiles.flatten(4).flatten(2, 3)) + self.place(place)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache, keep)
        tiles = self.unembed(x).view(*tiles.shape)
        return tiles.permute(0, 1, 6, 2, 4, 3, 5).reshape(video.shape)


class Loom:
    """The pipeline."""

    def __init__(self, seed: int = 0, window: int = 4) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = LoomNet().eval().requires_grad_(False)
        self.window = window

    def generate(self, noise: Tensor) -> Tensor:
        """Turn noise ``[B, frames, C, H, W]`` into latents of the same shape, chunk by chunk."""
        caches: list[dict[str, Tensor]] = [{} for _ in self.net.blocks]
        done = []
        for frame in range(0, noise.shape[1], CHUNK):
            chunk = noise[:, frame : frame + CHUNK]
            for i, level in enumerate(LEVELS):
                clean = self.net(chunk, torch.full((len(noise),), level), caches, frame)
                if i + 1 < len(LEVELS):
                    chunk = clean + LEVELS[i + 1] * torch.randn_like(clean)
            done.append(clean)
            self.net(clean, torch.zeros(len(noise)), caches, frame, keep=self.window)
        return torch.cat(done, dim=1)


class LoomAdapter(Adapter):
    """Rows of the temporal caches, seen frame by frame; attention is torch's own kernel, in the temporal modules."""

    name = "loom"
    context_kind = "per-site KV cache"

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """A network that takes caches and a number of frames to keep in them, with temporal attention."""
        net = getattr(model, "net", None)
        if not isinstance(net, nn.Module):
            return NoMatch("no pipeline with a .net module")
        reason = lacks(net, ("video", "level", "caches", "frame", "keep"), "the network's forward")
        return NoMatch(reason) if reason else Match(net, net.tile)

    def attach(self, model: Any, patches: Patches) -> None:
        """The kernel is called by everybody: it counts inside temporal attention only."""
        self.net = model.net
        patches.tap(F, "scaled_dot_product_attention", within=[block.time for block in model.net.blocks])

    def parse(self, arguments: Mapping[str, Any]) -> Call:
        """Every call says where it is and whether it writes."""
        return Call(
            arguments["video"],
            start=arguments["frame"],
            timestep=arguments["level"],
            commits=arguments["keep"] > 0,
            arguments=arguments,
        )

    def context(self, call: Call) -> CacheRows:
        """All cached frames, less the chunk's own once it has been written; space comes out of the batch again."""
        (down, across), (height, width) = self.net.tile, call.latents.shape[-2:]
        sites, batch = (height // down) * (width // across), len(call.latents)
        values = [c["v"].unflatten(0, (batch, sites)).transpose(1, 2) for c in call.arguments["caches"] if c]
        return CacheRows(values, 0, values[0].shape[1] * sites if values else 0, sites)

    def carry(self, call: Call, before: Tensor, after: Tensor) -> Tensor:
        """The sampler adds fresh noise to x0: keep the noise, move x0."""
        return call.latents + (after - before)
