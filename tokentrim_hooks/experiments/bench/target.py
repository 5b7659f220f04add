"""What a target of ``tokentrim bench`` is asked for, and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Size:
    """How large a target is; each reads what it knows.

    Attributes:
        device: a torch device.
        chunks: chunks of one rollout.
        full: the real model's size instead of one for a CPU.
        precision: name of a floating type of torch's; default: bfloat16 on a GPU, float32 on a CPU.
    """

    device: str = "cpu"
    chunks: int = 20
    full: bool = False
    precision: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What ``precision`` says."""
        default = "float32" if torch.device(self.device).type == "cpu" else "bfloat16"
        found: torch.dtype = getattr(torch, self.precision or default)
        return found


@dataclass(frozen=True)
class Target:
    """A model and one rollout of it. ``run`` seeds itself; ``words`` say what the model is.

    The rest is what a hand-written loop has to know (see :mod:`ideal`): the ``denoiser`` (without one that arm is left
    out), its ``calls`` per chunk, the axis of the frames in what it answers, the side of a ``patch`` in latent pixels.
    """

    model: Any
    run: Callable[[], Any]
    words: dict[str, Any] = field(default_factory=dict)
    denoiser: nn.Module | None = None
    calls: int = 5
    frames_dim: int = 1
    patch: int = 2
