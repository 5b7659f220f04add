"""Ribbon: an invented autoregressive video model that knows nothing of tokentrim.

It denoises a chunk of two latent frames in three steps. What it has finished lies in a :class:`Memory` of keys and
values, to which every finished chunk is appended and from which the oldest frames are cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = (1.0, 0.7, 0.4)
CHUNK, PATCH, CHANNELS = 2, 2, 4


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over ``[B, length, heads, width]``."""
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return mixed.transpose(1, 2)


@dataclass
class Memory:
    """Keys and values of finished frames, one tensor ``[B, rows, heads, width]`` per layer."""

    window: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def seen(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's memory followed by the current chunk."""
        if layer >= len(self.keys):
            return k, v
        return torch.cat([self.keys[layer], k], dim=1), torch.cat([self.values[layer], v], dim=1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Remember the current chunk, forget what is older than the window."""
        k, v = self.seen(layer, k, v)
        if layer >= len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        self.keys[layer], self.values[layer] = k[:, -self.window :], v[:, -self.window :]


class RibbonBlock(nn.Module):
    """Self attention over memory and chunk, then a perceptron."""

    def __init__(self, layer: int, dim: int, heads: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, heads
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, memory: Memory, remember: bool) -> Tensor:
        """``x`` is ``[B, tokens, dim]``."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        keys, values = memory.seen(self.layer, k, v)
        x = x + self.out(attend(q, keys, values).flatten(2))
        if remember:
            memory.append(self.layer, k, v)
        return x + self.mlp(self.norm2(x))


class RibbonNet(nn.Module):
    """Predicts the clean chunk from a noisy one and the memory."""

    def __init__(self, dim: int = 32, layers: int = 3, heads: int = 2) -> None:
        super().__init__()
        self.patch_size = PATCH
        self.blocks = nn.ModuleList(RibbonBlock(i, dim, heads) for i in range(layers))
        self.embed, self.unembed = nn.Linear(CHANNELS * PATCH**2, dim), nn.Linear(dim, CHANNELS * PATCH**2)
        self.level, self.place = nn.Linear(1, dim), nn.Linear(3, dim)

    def forward(self, latents: Tensor, level: Tensor, memory: Memory, start: int, remember: bool = False) -> Tensor:
        """``latents`` ``[B, F, C, H, W]`` at noise ``level`` ``[B]``, from frame ``start`` on; the same shape back."""
        batch, frames, channels, height, width = latents.shape
        grid = (frames, height // PATCH, width // PATCH)
        tiles = latents.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).permute(0, 1, 3, 5, 4, 6, 2)
        x = self.embed(tiles.flatten(4).flatten(1, 3)) + self.level(level.view(batch, 1, 1)) + self._places(grid, start)
        for block in self.blocks:
            x = block(x, memory, remember)
        tiles = self.unembed(x).view(batch, *grid, PATCH, PATCH, channels)
        return tiles.permute(0, 1, 6, 2, 4, 3, 5).reshape(latents.shape)

    def _places(self, grid: tuple[int, int, int], start: int) -> Tensor:
        axes = [torch.arange(n, device=self.place.weight.device) + (start if i == 0 else 0) for i, n in enumerate(grid)]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
        return self.place(torch.sin(places.float()))


class RibbonVideo:
    """The pipeline: ``RibbonVideo().generate(noise)``."""

    def __init__(self, seed: int = 0, window_frames: int = 6) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = RibbonNet().eval().requires_grad_(False)
        self.window_frames = window_frames

    def generate(self, noise: Tensor) -> Tensor:
        """Turn noise ``[B, frames, C, H, W]`` into latents of the same shape, chunk by chunk."""
        memory = Memory(self.window_frames * (noise.shape[3] // PATCH) * (noise.shape[4] // PATCH))
        video = []
        for start in range(0, noise.shape[1], CHUNK):
            chunk = noise[:, start : start + CHUNK]
            for i, level in enumerate(LEVELS):
                clean = self.net(chunk, self._level(noise, level), memory, start)
                if i + 1 < len(LEVELS):
                    chunk = clean + LEVELS[i + 1] * torch.randn_like(clean)
            video.append(clean)
            self.net(clean, self._level(noise, 0.0), memory, start, remember=True)
        return torch.cat(video, dim=1)

    def _level(self, noise: Tensor, level: float) -> Tensor:
        return torch.full((noise.shape[0],), level, device=noise.device, dtype=noise.dtype)
