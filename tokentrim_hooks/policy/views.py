"""What a policy is shown and what it answers: read-only views, and tensors on the model's device.

Shapes: ``B`` samples, ``F`` latent frames, ``C`` channels, ``H x W`` latent pixels, ``N`` spatial tokens of a frame
(row-major over the patch grid), ``D`` features of a token, ``k`` tokens of an unstable set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokentrim_hooks.policy.drift import Summary
from tokentrim_hooks.policy.statistics import Moments


@dataclass(frozen=True)
class Place:
    """Where a video is: what is known of a chunk at any of its calls.

    Attributes:
        phase: what the denoiser call does: ``"first"``, ``"refine"``, ``"commit"`` or ``"recache"``.
        index: ordinal of the chunk in its video; 0 is the first.
        start: absolute latent frame at which the chunk starts.
        frames: its number of latent frames.
        grid: (height, width) of the patch grid, ``N = height * width``.
    """

    phase: str
    index: int
    start: int
    frames: int
    grid: tuple[int, int]


class _ByToken:
    """A field that is given a summary in either form and is read by tokens, ``[B, N, D]``; it has no default."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._place = f"_{name}"

    def __get__(self, chunk: Any, owner: type | None = None) -> Tensor:
        if chunk is None:
            raise AttributeError(self._place)
        given: Tensor | Summary = chunk.__dict__[self._place]
        return given.tokens if isinstance(given, Summary) else given

    def __set__(self, chunk: Any, given: Tensor | Summary) -> None:
        chunk.__dict__[self._place] = given


@dataclass(frozen=True)
class Chunk(Place):
    """A read-only view of the chunk in question, for :meth:`Policy.judge`; :class:`Place` has the rest.

    Attributes:
        prediction: predicted clean latents x0, ``[B, F, C, H, W]``, in the model's dtype.
        summary: latent summary of ``prediction`` (Eq. 3-4), ``[B, N, D]``, float32 or wider.
        previous: the same of the previous chunk, as it was accepted.
        first: the same of the scene's first chunk (a scene begins with the video, and at a prompt switch or a cut);
            that of the previous chunk where there is none yet.
        drift: distance of every token to the previous chunk (Eq. 5), ``[B, N]``.

    Summaries are laid out by tokens when a policy first asks for them.
    """

    prediction: Tensor
    drift: Tensor
    summary: _ByToken = _ByToken()
    previous: _ByToken = _ByToken()
    first: _ByToken = _ByToken()


@dataclass(frozen=True)
class Noisy(Place):
    """A chunk before a denoising call, for :meth:`Policy.guide`.

    Attributes:
        latents: the noisy latents of the call, ``[B, F, C, H, W]``, in the model's dtype; not to be written into.
        level: ``level()`` is their noise level as a number, 0 clean and 1 pure noise, the highest of all frames. It
            waits for the device, once per call.
        predict: ``predict(latents)`` is the x0 that the model would predict of others like ``latents``, with gradients.
            It calls the denoiser on a copy of what the call would write, so nothing of the model is touched.
    """

    latents: Tensor
    level: Callable[[], float]
    predict: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Denoised(Place):
    """A read-only view of a chunk at its last denoising call, for :meth:`Policy.correct`.

    Attributes:
        prediction: the x0 that the sampler would go on with, ``[B, F, C, H, W]``, in the model's dtype.
        earlier: x0 of the denoising calls before, the latest last: as many as :attr:`Policy.remembers` asks for.
        opening: the scene's first chunk as it was accepted, ``[B, F, C, H, W]``; None while that is in progress.
    """

    prediction: Tensor
    earlier: tuple[Tensor, ...] = ()
    opening: Tensor | None = None


@dataclass(frozen=True)
class ContextView:
    """What a call can read of earlier frames, for :meth:`Policy.hide`: finished ones, sinks first, then oldest first.

    Attributes:
        anchors: per latent frame, whether it is a sink or an anchor.
        tokens: tokens of a frame.
        summaries: of each frame, ``[B, frames, D]``, float32 on the CPU (:func:`~tokentrim_hooks.policy.drift.
            frame_summaries`); NaN for a frame of another scene, one that nobody saw being made, and the anchors of a
            cache. None unless the policy :attr:`~Policy.compares`.
    """

    anchors: tuple[bool, ...]
    tokens: int
    summaries: Tensor | None = None

    @property
    def frames(self) -> int:
        """Number of latent frames."""
        return len(self.anchors)


@dataclass(frozen=True)
class Rows:
    """The rows of a KV cache that a commit has just written, in one layer, for :meth:`Policy.settle`.

    Attributes:
        layer: ordinal of the layer.
        values: V, ``[B, F * N, heads, head_dim]``, frame by frame, in the cache's dtype.
        keys: K likewise (before or after its rotary embedding, as the model keeps it).
        first_values, first_keys: moments over the rows of the scene's first chunk, ``[B, 1, heads, head_dim]``; None
            while that one is being written.
        anchor_values, anchor_keys: rows of sinks, ``[B, rows, heads, head_dim]``; None where there are none.
    """

    layer: int
    values: Tensor
    keys: Tensor | None = None
    first_values: Moments | None = None
    first_keys: Moments | None = None
    anchor_values: Tensor | None = None
    anchor_keys: Tensor | None = None


@dataclass(frozen=True)
class History:
    """Severities that were accepted before the chunk in question; a scene's first chunk has none.

    Attributes:
        count: number of severities since the statistics began (with the video, or at a prompt switch or re-cache).
        mean: their mean, ``[B]``, float64 on the model's device (float32 where it has no float64).
        std: their population standard deviation, ``[B]``; 0 while ``count`` is below 2.
        recent: the latest of them one by one, ``[B, n]``, as many as :attr:`Policy.recalls` asks for; None for none.
    """

    count: int
    mean: Tensor
    std: Tensor
    recent: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """A policy's answer, per sample.

    Attributes:
        tokens: the unstable set, LongTensor ``[B, k]``, row-major over the patch grid. With ``k = 0`` a chunk that is
            to be pruned is only regenerated, on the context as it is.
        severity: ``[B]``, in the latents' units.
        threshold: ``[B]``, in the same units; infinite where there is nothing to compare with.
        prune: BoolTensor ``[B]``: which samples are pruned and regenerated.
        watched: ``[B]``, what another policy measures, which only watches (:class:`Watched`); recorded, nothing else.
    """

    tokens: Tensor
    severity: Tensor
    threshold: Tensor
    prune: Tensor
    watched: Tensor | None = None
