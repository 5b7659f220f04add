"""What the three observers share: the figures and the picture of one chunk record."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tokentrim_hooks import ChunkRecord

Picture = npt.NDArray[np.uint8]
"""``[height, width, 3]``, red, green, blue."""

RED = (214, 40, 57)
PIXELS = 8
"""Side of one token in :func:`drift_picture`."""


def series(record: ChunkRecord) -> str:
    """Name of the series that a record belongs to: chunks count anew in every video, samples of a batch differ."""
    return f"v{record.video}-s{record.sample}"


def figures(record: ChunkRecord) -> dict[str, float]:
    """The record's finite figures; others (a first chunk's severity, the threshold in warm-up) are absent, not zero."""
    values = {
        "severity": record.severity,
        "threshold": record.threshold,
        "accepted_severity": record.accepted_severity,
        "pruned_tokens": len(record.tokens) if record.pruned else 0,
        "dead_rows": record.dead,
        "extra_calls": record.extra_calls,
        "seconds": record.seconds,
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def drift_picture(record: ChunkRecord) -> Picture | None:
    """Drift as grey (white is the chunk's greatest), pruned tokens red; None for a chunk that was not judged."""
    if not record.drift:
        return None
    drift = np.asarray(record.drift).reshape(record.grid)
    grey = (255 * drift / max(float(drift.max()), 1e-12)).round().astype(np.uint8)
    picture = np.repeat(grey[..., None], 3, axis=2)
    if record.pruned:
        picture.reshape(-1, 3)[list(record.tokens)] = RED
    return picture.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)


def latent_picture(latents: Tensor) -> Picture:
    """First three channels of the mean frame of one sample's latents ``[F, C, H, W]``: a quick look, not a decode.

    Costs one more read from the device a chunk.
    """
    mean = latents.float().mean(dim=0)[:3]
    low, high = mean.amin(), mean.amax()
    scaled = (255 * (mean - low) / (high - low).clamp(min=1e-12)).round().byte()
    picture: Picture = scaled.movedim(0, -1).expand(-1, -1, 3).cpu().numpy()
    return picture
