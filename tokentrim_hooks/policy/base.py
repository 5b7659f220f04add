"""What a policy is asked and what it answers. A policy sees tensors, never a model, and never synchronises.

Shapes: ``B`` samples, ``F`` latent frames, ``C`` channels, ``H x W`` latent pixels, ``N`` spatial tokens of a frame
(row-major over the patch grid), ``D`` features of a token, ``k`` tokens of an unstable set.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A read-only view of the chunk in question.

    Attributes:
        phase: what the latest denoiser call did: ``"first"``, ``"refine"``, ``"commit"`` or ``"recache"``.
        index: ordinal of the chunk in its video; 0 is the first.
        start: absolute latent frame at which the chunk starts.
        frames: its number of latent frames.
        grid: (height, width) of the patch grid, ``N = height * width``.
        prediction: predicted clean latents x0, ``[B, F, C, H, W]``, in the model's dtype.
        summary: latent summary of ``prediction`` (Eq. 3-4), ``[B, N, D]``, float32 or wider.
        previous: the same of the previous chunk, as it was accepted.
        first: the same of the scene's first chunk (a scene begins with the video, and at a prompt switch or a cut);
            that of the previous chunk where there is none yet.
        drift: distance of every token to the previous chunk (Eq. 5), ``[B, N]``.
    """

    phase: str
    index: int
    start: int
    frames: int
    grid: tuple[int, int]
    prediction: Tensor
    summary: Tensor
    previous: Tensor
    first: Tensor
    drift: Tensor


@dataclass(frozen=True)
class History:
    """Severities that were accepted before the chunk in question; a scene's first chunk has none.

    Attributes:
        count: number of severities since the statistics began (with the video, or at a prompt switch or re-cache).
        mean: their mean, ``[B]``, float64 on the model's device (float32 where it has no float64).
        std: their population standard deviation, ``[B]``; 0 while ``count`` is below 2.
    """

    count: int
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Verdict:
    """A policy's answer, per sample.

    Attributes:
        tokens: the unstable set, LongTensor ``[B, k]``, row-major over the patch grid. With ``k = 0`` a chunk that is
            to be pruned is only regenerated, on the context as it is.
        severity: ``[B]``, in the latents' units.
        threshold: ``[B]``, in the same units; infinite where there is nothing to compare with.
        prune: BoolTensor ``[B]``: which samples are pruned and regenerated.
    """

    tokens: Tensor
    severity: Tensor
    threshold: Tensor
    prune: Tensor


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies: a frozen dataclass whose fields are its options, with hooks that do nothing by default.

    Override :meth:`judge`. Options of your own are fields with defaults; check them in ``__post_init__`` and call
    ``super().__post_init__()`` there. The options below say what follows a verdict, so they are every judge's.

    Args:
        max_regenerations: R, regenerations per chunk at most; 0 prunes nothing.
        persist: the pruned context goes forward (the paper, line 19); False brings the tokens back after the chunk.
        prune_anchors: also prune sinks and anchors, which are spared by default.
        coarse: where one key of the context covers several tokens (FramePack, Helios), it dies with ``"any"`` of them
            (the pruned content is gone for sure) or only with ``"all"`` of them (less is lost beside it).

    Raises:
        TypeError: an option that the policy does not have.
        ValueError: a value out of range; the message names the range.

    Example:
        >>> @dataclass(frozen=True)
        ... class WorstToken(Policy):
        ...     '''Prunes the single worst token of a chunk that drifts further than ``limit``.'''
        ...
        ...     limit: float = 1.0
        ...
        ...     def judge(self, chunk, history):
        ...         severity, token = chunk.drift.max(dim=-1)
        ...         threshold = torch.full_like(severity, self.limit)
        ...         return Verdict(token[:, None], severity, threshold, severity > threshold)
    """

    max_regenerations: int = 1
    persist: bool = True
    prune_anchors: bool = False
    coarse: Literal["any", "all"] = "any"

    def __post_init__(self) -> None:
        whole("max_regenerations", self.max_regenerations)
        flag("persist", self.persist)
        flag("prune_anchors", self.prune_anchors)
        if self.coarse not in ("any", "all"):
            raise ValueError(f"coarse must be 'any' or 'all', got {self.coarse!r}")

    def judge(self, chunk: Chunk, history: History) -> Verdict | None:
        """Judge a chunk, once per attempt, after the probe's prediction; on the model's device, without reading it.

        Args:
            chunk: the chunk in question. Not asked for a video's first chunk, which has no predecessor, nor for one
                that was handed in as clean context.
            history: severities of the chunks accepted before.

        Returns:
            The verdict; None for no opinion, and then the chunk is accepted and enters no statistics.
        """
        return None

    def redraw(self, latents: Tensor, start: int) -> Tensor | None:
        """Other noise to regenerate a chunk from: like ``latents`` ``[B, F, C, H, W]`` of the chunk at latent frame
        ``start``; None for the same noise again. For controls (see :class:`FreshNoise`).
        """
        return None

    def settings(self) -> dict[str, Any]:
        """The options by name, flat: what logs and tables record."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        """The policy with the options that are not at their defaults."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def judges(self) -> bool:
        """Whether the policy overrides :meth:`judge`."""
        return type(self).judge is not Policy.judge


def number(name: str, value: object, low: float, high: float, rule: str) -> None:
    """Check an option: a finite number in ``[low, high]``; ``rule`` says so in words.

    Raises:
        ValueError: it is not.
    """
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:  # type: ignore[operator]  # mypy cannot see through `good`
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def whole(name: str, value: object) -> None:
    """Check an option: a whole number >= 0.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number >= 0, got {value!r}")


def flag(name: str, value: object) -> None:
    """Check an option: True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
