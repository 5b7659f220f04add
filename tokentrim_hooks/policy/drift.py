"""Drift between two chunks: pure tensor functions, on the device of their inputs (paper, Equations 3 to 7).

Shapes: ``B`` samples, ``F`` latent frames, ``C`` channels, ``H x W`` latent pixels, ``N`` spatial tokens of a frame
(row-major over the patch grid), ``D = C * patch_h * patch_w`` features of a token. Accumulation is in float32, or in
the input's type where that is wider.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from tokentrim_hooks.errors import LatentsError

LARGE = 1 << 16
"""Numbers in a chunk's latents from which on its frames are added one by one."""
FEW = 2048
"""Tokens of which a full sort takes no longer than what a choice of the largest few needs beside itself."""


def latent_summary(latents: Tensor, patch_size: tuple[int, int] = (2, 2)) -> Tensor:
    """Average the spatial tokens of a chunk over its frames (Eq. 3-4).

    Args:
        latents: ``[B, F, C, H, W]``, any floating type.
        patch_size: (height, width) of a token in latent pixels.

    Returns:
        ``[B, N, D]``, float32 or wider.

    Raises:
        LatentsError: latents are not five-dimensional, or H or W is not divisible by the patch size.
    """
    return Summary.of(latents, patch_size).tokens


@dataclass(frozen=True)
class Summary:
    """Latent summary of a chunk that is laid out by tokens only when somebody asks.

    That takes twice as long as the mean itself, and the drift between two of them does not need it.

    Attributes:
        mean: of the chunk's frames, ``[B, C, H, W]``, float32 or wider.
        patch_size: (height, width) of a token in latent pixels.
    """

    mean: Tensor
    patch_size: tuple[int, int]

    @classmethod
    def of(cls, latents: Tensor, patch_size: tuple[int, int]) -> Summary:
        """Of latents ``[B, F, C, H, W]``; raises as :func:`latent_summary` does."""
        if latents.ndim != 5:
            raise LatentsError(f"latents must be [B, F, C, H, W], got shape {tuple(latents.shape)}")
        (height, width), (p, q) = latents.shape[-2:], patch_size
        if height % p or width % q:
            raise LatentsError(f"a {height}x{width} latent is not divisible into {p}x{q} patches; correct patch_size")
        return cls(_mean_of_frames(latents), patch_size)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """By tokens, ``[B, N, D]``."""
        p, q = self.patch_size
        laid_out: Tensor = rearrange(self.mean, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q)
        return laid_out

    def drift(self, previous: Summary) -> Tensor:
        """:func:`token_drift` of both, ``[B, N]``: features are summed where they lie, channels first."""
        _require_alike(self.mean, previous.mean)
        difference = self.mean - previous.mean
        squares = difference.mul_(difference).sum(dim=1)
        # A sum over each patch, which one kernel makes in half the time of a sum over two dimensions.
        by_token = functional.avg_pool2d(squares, self.patch_size, divisor_override=1)
        return by_token.sqrt_().flatten(1)


def _mean_of_frames(latents: Tensor) -> Tensor:
    """``[B, F, C, H, W] -> [B, C, H, W]``, float32 or wider; never a view of ``latents``, which others write into.

    On a CPU torch's mean over this dimension takes from 1.5 times (1,560 tokens) to 13 times (33,000) as long as adding
    frame by frame, which rounds alike; from ten frames on it does not, and for small frames one kernel is less.
    """
    wide = latents.dtype if latents.dtype in (torch.float32, torch.float64) else torch.float32
    few = latents.shape[1] < 10 and latents.numel() > LARGE
    if not few or latents.device.type != "cpu":
        return latents.mean(dim=1, dtype=wide)
    first, *others = latents.unbind(1)
    # The first sum is made in the wide type, too: torch adds what is narrower to it.
    total = first.to(wide, copy=not others)
    total = torch.add(total, others[0]) if others else total
    for frame in others[1:]:
        total.add_(frame)
    return total.div_(latents.shape[1])


def frame_summaries(latents: Tensor, cells: int = 8) -> Tensor:
    """A small picture of every frame: averages over at most ``cells x cells`` areas, per channel.

    ``[B, F, C, H, W] -> [B, F, D]``, float32, ``D = C * min(H, cells) * min(W, cells)``.
    """
    size = (min(latents.shape[-2], cells), min(latents.shape[-1], cells))
    small: Tensor = torch.nn.functional.adaptive_avg_pool2d(latents.flatten(0, 1).float(), size)
    return small.reshape(latents.shape[0], latents.shape[1], -1)


def grid_of(latents: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the token grid of latents ``[..., H, W]``."""
    return latents.shape[-2] // patch_size[0], latents.shape[-1] // patch_size[1]


def token_drift(current: Tensor, previous: Tensor) -> Tensor:
    """Euclidean distance of every token to its predecessor (Eq. 5): ``[B, N, D], [B, N, D] -> [B, N]``."""
    _require_alike(current, previous)
    drift: Tensor = torch.linalg.vector_norm(current - previous, dim=-1)
    return drift


def _require_alike(current: Tensor, previous: Tensor) -> None:
    if current.shape != previous.shape:
        raise LatentsError(
            f"chunk summaries differ in shape: {tuple(current.shape)} against {tuple(previous.shape)}; "
            "the batch size or the frame size changed in the middle of a rollout; call handle.reset()"
        )


@functools.lru_cache(maxsize=64)
def unstable_count(fraction: float, tokens: int) -> int:
    """``ceil(fraction * tokens)``, exact for the decimal number that was written (0.07 of 100 is 7, not 8)."""
    return min(tokens, math.ceil(Fraction(str(fraction)) * tokens))


def unstable_tokens(drift: Tensor, fraction: float) -> Tensor:
    """Indices of the ``ceil(fraction * N)`` largest drifts, largest first: ``[B, N] -> LongTensor[B, k]``.

    Ties go to the lower index, on every device.
    """
    tokens = drift.shape[-1]
    count = unstable_count(fraction, tokens)
    if tokens <= FEW or drift.dtype != torch.float32:
        return torch.sort(drift, dim=-1, descending=True, stable=True).indices[:, :count]
    # A full sort of 14,400 tokens takes twenty times as long as their largest few, but topk leaves ties to chance. So
    # no two keys are alike: the bits of a float, which are ordered as it is (-0.0 becomes 0.0, the bits of negatives
    # are turned round), before the index. Made in int64, for that is what the places are.
    bits = (drift + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    places = torch.arange(0, -tokens, -1, device=drift.device)
    return torch.add(places, ordered, alpha=tokens).topk(count, dim=-1).indices


def severity_of(drift: Tensor, tokens: Tensor) -> Tensor:
    """Mean drift over the unstable set (Eq. 6): ``[B, N], LongTensor[B, k] -> [B]``."""
    return drift.gather(-1, tokens).mean(dim=-1)


@dataclass(frozen=True)
class RunningStatistics:
    """Mean and population standard deviation of severities, per sample (Eq. 7), by Welford's update.

    ``count`` is the number of severities, ``mean`` and ``m2`` (sum of squared deviations) are ``[B]`` in float64
    where the device has it. ``recent`` are the latest ``keep`` severities one by one, ``[B, n]``; None while that is 0.
    """

    count: int
    mean: Tensor
    m2: Tensor
    keep: int = 0
    recent: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, device: torch.device | str = "cpu", keep: int = 0) -> RunningStatistics:
        """Statistics of no severity."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        zeros = torch.zeros(batch, dtype=dtype, device=device)
        return cls(0, zeros, zeros, keep, zeros.new_empty(batch, 0) if keep else None)

    @functools.cached_property
    def std(self) -> Tensor:
        """Population standard deviation ``[B]``; 0 while fewer than two severities were seen."""
        return (self.m2 / max(self.count, 1)).sqrt()

    def updated(self, severity: Tensor) -> RunningStatistics:
        """Statistics with one more severity ``[B]``."""
        count = self.count + 1
        severity = severity.to(self.mean)
        delta = severity - self.mean
        mean = torch.add(self.mean, delta, alpha=1 / count)
        recent = self.recent
        if recent is not None:
            recent = torch.cat([recent, severity[:, None]], dim=1)[:, -self.keep :]
        m2 = torch.addcmul(self.m2, delta, severity - mean)
        return RunningStatistics(count, mean, m2, self.keep, recent)
