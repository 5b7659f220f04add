"""What came of judging a chunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokentrim_hooks.policy.drift import Summary
from tokentrim_hooks.rollout.reading import Reading


@dataclass
class Judgement:
    """What came of judging a chunk: the regenerator's answer.

    Attributes:
        output: what the sampler goes on with; None once it was handed over. prediction: its x0, ``[B, F, C, H, W]``.
        summary: latent summary of ``prediction``, where it was made.
        severity: of what was accepted, ``[B]`` on the device; None where no policy had an opinion.
        reading: the first verdict on the host; None where there was none.
        accepted: the verdict on what was accepted after regeneration; None where nothing was regenerated.
        given: the call's latents were clean: the chunk was handed in.
        waiting: the video's waiting flags, if they were read; see :class:`VideoState`.
        tokens: tokens pruned, per sample; an empty list spares the sample, no list at all means nothing was pruned.
        dead: context rows that died. anchors: latent frames spared as sinks or anchors.
        regenerations, extra_calls: attempts after the first, and the denoiser calls that they cost.
        proof_calls: denoiser calls that showed that a call can be made twice. notes: anything unusual.
    """

    output: Any
    prediction: Tensor
    summary: Summary | None = None
    severity: Tensor | None = None
    reading: Reading | None = None
    accepted: Reading | None = None
    given: bool = False
    waiting: list[bool] | None = None
    tokens: list[list[int]] = field(default_factory=list)
    dead: int = 0
    anchors: int = 0
    regenerations: int = 0
    extra_calls: int = 0
    proof_calls: int = 0
    notes: list[str] = field(default_factory=list)
