"""The control chart of a run as an IMAGE: float32 ``[B, H, W, 3]`` from 0 to 1, one picture per sample."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ChunkRecord, Report


def chart(report: Report) -> Tensor:
    """Severity and threshold per chunk of the latest video, ``[B, H, W, 3]``; B samples.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    records = latest(report)
    samples = sorted({record.sample for record in records}) or [0]
    warmup = int(report.settings.get("policy.warmup", 0))
    pictures = [_drawn([r for r in records if r.sample == sample], warmup) for sample in samples]
    height, width = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    return torch.stack([_padded(p, height, width) for p in pictures])


def latest(report: Report) -> list[ChunkRecord]:
    """Records of the latest video."""
    video = max((record.video for record in report), default=0)
    return [record for record in report if record.video == video]


def _drawn(records: list[ChunkRecord], warmup: int) -> Tensor:
    buffer = io.BytesIO()
    tokentrim.control_chart(records, warmup).savefig(buffer, format="png", dpi=150)
    return torch.from_numpy(np.asarray(Image.open(buffer).convert("RGB"), dtype=np.float32) / 255)


def _padded(picture: Tensor, height: int, width: int) -> Tensor:
    white = torch.ones(height, width, 3)
    white[: picture.shape[0], : picture.shape[1]] = picture
    return white
