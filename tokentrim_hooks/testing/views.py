"""What a policy is shown, made from a drift alone: to try a policy without any model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import HOOKS, Policy
from tokentrim_hooks.policy.drift import frame_summaries, latent_summary, token_drift
from tokentrim_hooks.policy.statistics import Moments
from tokentrim_hooks.policy.views import Chunk, ContextView, Denoised, History, Noisy, Place, Rows


def chunk_of(drift: Tensor, index: int = 1, frames: int = 3) -> Chunk:
    """A chunk whose tokens have drifted by ``drift`` ``[B, N]`` from a previous chunk that was all zero.

    Args:
        drift: of every token; not negative.
        index: ordinal of the chunk.
        frames: latent frames per chunk.

    Example:
        >>> DriftPolicy().judge(chunk_of(torch.rand(2, 64)), history)  # doctest: +SKIP
    """
    summary = drift[..., None]
    return Chunk(
        phase="first",
        index=index,
        start=index * frames,
        frames=frames,
        grid=(1, drift.shape[1]),
        prediction=drift[:, None, None, None].expand(-1, frames, 1, 1, -1),
        summary=summary,
        previous=torch.zeros_like(summary),
        first=torch.zeros_like(summary),
        drift=drift,
    )


@dataclass(frozen=True)
class Views:
    """What each hook of a policy is shown at one place of a video, made of random numbers.

    Attributes:
        chunk, history: for ``judge``. place, context: for ``hide``. denoised: for ``correct``. rows: for ``settle``,
            with ``place``. noisy: for ``guide``.
    """

    chunk: Chunk
    history: History
    place: Place
    context: ContextView
    denoised: Denoised
    rows: Rows
    noisy: Noisy

    @classmethod
    def random(
        cls,
        seed: int = 0,
        batch: int = 2,
        phase: str = "commit",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        first: bool = False,
    ) -> Views:
        """Views of a chunk of 3 frames of 4 channels and 4 x 6 tokens of 2 x 2, behind 2 anchors and 7 other frames.

        Args:
            seed: of all numbers. batch: samples. phase: of the call, see :class:`Place`.
            device, dtype: of latents and rows. first: as in the scene's first chunk, with nothing to compare with.
        """
        rng = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(device, dtype)

        index = 0 if first else 4
        where: dict[str, Any] = {"index": index, "start": 3 * index, "frames": 3, "grid": (4, 6)}
        x0, opening, rows, anchors = noise(batch, 3, 4, 8, 12), noise(batch, 3, 4, 8, 12), noise(batch, 72, 2, 8), 48
        summary, previous = latent_summary(x0), latent_summary(noise(batch, 3, 4, 8, 12))
        severities = noise(batch, 5).abs().double()
        # On the host, as the rollout shows them; frames grow alike towards the newest one.
        seen = torch.randn(batch, 9, 4, 8, 12, generator=rng) + torch.linspace(-3, 3, 9).view(9, 1, 1, 1)
        settled = Moments.of(noise(batch, 72, 2, 8), (1,))
        return cls(
            Chunk("first", **where, prediction=x0, summary=summary, previous=previous,
                  first=latent_summary(opening), drift=token_drift(summary, previous)),
            History(5, severities.mean(1), severities.std(1, correction=0), severities),
            Place(phase, **where),
            ContextView((True,) * 2 + (False,) * 7, math.prod(where["grid"]), None if first else frame_summaries(seen)),
            Denoised("refine", **where, prediction=x0, earlier=(noise(*x0.shape), noise(*x0.shape)),
                     opening=None if first else opening),
            Rows(0, rows, noise(*rows.shape), None if first else settled, None if first else settled,
                 None if first else noise(batch, anchors, 2, 8), None if first else noise(batch, anchors, 2, 8)),
            Noisy("first", **where, latents=noise(*x0.shape), level=lambda: 1.0,
                  predict=lambda latents: torch.tanh(latents + latents.roll(1, dims=1)) / 2),
        )  # fmt: skip

    def ask(self, policy: Policy) -> dict[str, Any]:
        """The answers of the hooks that ``policy`` overrides, by their names."""
        shown: dict[str, tuple[Any, ...]] = {
            "guide": (self.noisy,),
            "judge": (self.chunk, self.history),
            "hide": (self.place, self.context),
            "correct": (self.denoised,),
            "settle": (self.place, self.rows),
        }
        return {hook: getattr(policy, hook)(*shown[hook]) for hook in HOOKS if policy.overrides(hook)}
