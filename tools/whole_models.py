"""Models of Self-Forcing's width whose videos ``whole_videos.py`` and ``hook_share.py`` make call by call.

Random weights; one video after the other in one cache. FastVideo's needs the package, which ``make test-models``
installs into ``third_party/fv`` for ``PYTHONPATH``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tokentrim_hooks.experiments.bench import fastvideo_target as fastvideo
from tokentrim_hooks.experiments.bench.target import Size
from tokentrim_hooks.reference.pipeline import ReferencePipeline

WINDOW, FRAMES, STEPS = 21, 3, (1000, 750, 500, 250, 0)
WIDTH = {"dim": 1536, "heads": 12}


class Model(Protocol):
    """A model and what its sampler keeps between calls.

    Attributes:
        target: what is patched. kept: bytes of the KV cache.
    """

    target: Any
    kept: int

    def begin(self) -> None:
        """A new video."""

    def noise(self, rng: torch.Generator) -> Tensor:
        """Of one chunk."""

    def call(self, latents: Tensor, number: int, step: int, chunk: int) -> Tensor:
        """x0 of the chunk's call ``number``, at noise level ``step``."""


class OfReference:
    """The reference model of this package, called as Self-Forcing's is."""

    def __init__(self, layers: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.target = ReferencePipeline.random(layers=layers, grid=grid, local_attn_size=WINDOW, dtype=dtype, **WIDTH)
        self.denoiser: Callable[..., Any] = self.target.generator
        self._grid, self._dtype, model = grid, dtype, self.target.generator.model
        rows = (1, WINDOW * grid[0] * grid[1], model.num_heads, model.head_dim)
        self._cache: list[dict[str, Any]] = [
            {name: torch.zeros(rows, dtype=dtype) for name in "kv"} for _ in range(layers)
        ]
        self.kept = _bytes(self._cache)

    def begin(self) -> None:
        """A new video."""
        for layer in self._cache:
            layer |= {name: torch.zeros(1, dtype=torch.long) for name in ("global_end_index", "local_end_index")}

    def noise(self, rng: torch.Generator) -> Tensor:
        """``[1, F, C, H, W]``."""
        height, width = self._grid
        return torch.randn(1, FRAMES, 3, 4 * height, 4 * width, generator=rng).to(self._dtype)

    def call(self, latents: Tensor, number: int, step: int, chunk: int) -> Tensor:
        """x0."""
        timestep, start = torch.full((1, FRAMES), step), chunk * FRAMES * self._grid[0] * self._grid[1]
        x0: Tensor = self.denoiser(latents, None, timestep, kv_cache=self._cache, current_start=start)[1]
        return x0


class OfFastVideo:
    """FastVideo's ``CausalWanTransformer3DModel`` at Self-Forcing's 1.3 B shapes, but for layers and grid."""

    def __init__(self, layers: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        shape = replace(fastvideo.FULL, layers=layers, height=2 * grid[0], latent_width=2 * grid[1])
        size = Size(full=True, precision=str(dtype).removeprefix("torch."))
        self.target, _ = fastvideo.sampler(shape, size)
        self._kv, self._cross = self.target.caches()
        self.kept = _bytes(self._kv)

    def begin(self) -> None:
        """A new video."""
        for layer, cross in zip(self._kv, self._cross, strict=True):
            layer |= {"global_end_index": 0, "local_end_index": 0}
            cross |= {"k": None, "v": None, "is_init": False}

    def noise(self, rng: torch.Generator) -> Tensor:
        """``[1, C, F, H, W]``."""
        shape = self.target.shape
        noise = torch.randn(1, 16, FRAMES, shape.height, shape.latent_width, generator=rng)
        return noise.to(self.target.size.dtype)

    def call(self, latents: Tensor, number: int, step: int, chunk: int) -> Tensor:
        """x0; the clean call is step 0 again, as in FastVideo's stage."""
        index = number if step else 0
        flow = self.target.call(latents, step, index, FRAMES * chunk, self._kv, self._cross)
        return fastvideo.pred_noise_to_pred_video(flow, latents, step / 1000)


MODELS: dict[str, Callable[[int, tuple[int, int], torch.dtype], Model]] = {
    "reference": OfReference,
    "fastvideo": OfFastVideo,
}


class _NoProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            x, weight = args[:2]
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        if func is functional.scaled_dot_product_attention:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_multiplied() -> Iterator[None]:
    """Products of matrices are zeros, attention is its query: what is left of a video's time is little."""
    with _NoProducts():
        yield


def _bytes(cache: list[dict[str, Any]]) -> int:
    return sum(int(rows.nbytes) for layer in cache for rows in (layer["k"], layer["v"]))
