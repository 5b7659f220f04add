"""What each kind of reference model is trained with; :mod:`tokentrim_hooks.reference.train` does it."""

from __future__ import annotations

from dataclasses import dataclass

from tokentrim_hooks.reference.kinds import BASE


@dataclass(frozen=True)
class Phase:
    """A part of the training, with clips of one size.

    Attributes:
        share: of all steps.
        frames, batch: of a clip, and how many clips there are in a step.
        passes: how often every batch is used: first with the true video as context, then with what the pass before
            predicted, so that the model meets its own errors and learns to correct them.
    """

    share: float
    frames: int
    batch: int
    passes: int = 1


@dataclass(frozen=True)
class Recipe:
    """How a kind is trained.

    Attributes:
        steps: optimiser steps.
        rate: peak learning rate of a cosine that ends at 1 % of it, after ``warmup`` steps up.
        phases: see :class:`Phase`; short clips first, for attention is what costs.
        context_noise: largest standard deviation of the noise on a video's context; each video draws its own.
        rank: of the differences to the base that are trained; 0: all weights are trained.
        jump: most frames that a clip leaves out behind its first chunk, so that the sink is met at any age.
    """

    steps: int
    rate: float
    phases: tuple[Phase, ...]
    warmup: int = 50
    context_noise: float = 0.1
    rank: int = 0
    jump: int = 0


RECIPES = {
    BASE: Recipe(steps=450, rate=1.5e-3, phases=(Phase(0.65, 12, 6), Phase(0.35, 24, 3))),
    "sink": Recipe(steps=200, rate=1.5e-3, phases=(Phase(1.0, 24, 3),), warmup=20, rank=16, jump=180),
    "framewise": Recipe(
        steps=150, rate=1.5e-3, phases=(Phase(0.6, 12, 6), Phase(0.4, 24, 3)), warmup=20, rank=16
    ),
}
