"""Small pictures of latents, for heat maps where decoded frames are not at hand: an observer that the user asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.extras import require
from tokentrim_hooks.markers import hookimpl
from tokentrim_hooks.report.observers import ObserverFactory
from tokentrim_hooks.report.record import ChunkRecord, thumbnail_name


class Thumbnails:
    """Writes ``folder/thumbs/v0-c0003-s0.png`` for every accepted chunk: its first three principal components as RGB.

    The components are those of the video's first chunk, so that colours mean the same throughout. Costs one more host
    read per chunk, of one small picture per sample.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / "thumbs"
        self._video = -1
        self._basis: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Write one picture per sample."""
        image = require("PIL.Image", "report")
        mean = latents.float().mean(dim=1)
        if records[0].video != self._video or self._basis is None:
            self._video, self._basis = records[0].video, principal(mean)
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures = project(mean, self._basis).cpu().numpy()
        for record, picture in zip(records, pictures, strict=True):
            image.fromarray(picture).save(self.folder / thumbnail_name(record))


def _thumbnails(folder: Path | None) -> Thumbnails:
    if folder is None:
        raise TokenTrimError("thumbnails need a folder: make_observer('thumbnails', folder), the folder of JsonLines")
    require("PIL.Image", "report")
    return Thumbnails(folder)


@hookimpl
def tokentrim_observers() -> Mapping[str, ObserverFactory]:
    """The built-in observer, found as any other: pictures that the page shows beside drift maps."""
    return {"thumbnails": _thumbnails}


def principal(mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(centre ``[C]``, components ``[C, 3]``, low ``[3]``, high ``[3]``) of latents ``[B, C, H, W]``."""
    pixels = mean.movedim(1, -1).flatten(0, 2)
    centre = pixels.mean(0)
    _, _, directions = torch.linalg.svd(pixels - centre, full_matrices=False)
    components = torch.zeros(mean.shape[1], 3, device=mean.device)
    components[:, : min(3, len(directions))] = directions[:3].T
    values = (pixels - centre) @ components
    return centre, components, values.amin(0), values.amax(0)


def project(mean: Tensor, basis: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Latents ``[B, C, H, W]`` as uint8 pictures ``[B, H, W, 3]``."""
    centre, components, low, high = basis
    values = (mean.movedim(1, -1) - centre) @ components
    scaled = (values - low) / (high - low).clamp(min=1e-12)
    return (255 * scaled.clamp(0, 1)).round().to(torch.uint8)
