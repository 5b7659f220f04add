"""Small pictures of latents, for heat maps where decoded frames are not at hand: an observer that the user asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.extras import require
from tokentrim_hooks.markers import hookimpl
from tokentrim_hooks.report.files import below, is_within, named, write_picture
from tokentrim_hooks.report.log_file import tag_in
from tokentrim_hooks.report.names import tag_of, thumbs_of
from tokentrim_hooks.report.observers import ObserverFactory
from tokentrim_hooks.report.record import ChunkRecord, thumbnail_name

SIDE = 4096
"""Pixels of a side of a picture at most; those that we write are the size of a latent."""


class Thumbnails:
    """Writes ``folder/thumbs/v0-c0003-s0.png`` for every accepted chunk: its first three principal components as RGB.

    The components are those of the video's first chunk, so that colours mean the same throughout. Costs one more host
    read per chunk, of one small picture per sample. Where the log beside them has a tag they have it too: the pictures
    of ``chunks.rank1.jsonl`` are in ``thumbs.rank1``.
    """

    def __init__(self, folder: str | Path) -> None:
        self._run = named(folder).absolute()  # wherever the process goes
        self._process = os.getpid()
        self._video = -1
        self._basis: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Write one picture per sample.

        Raises:
            ReportError: a picture cannot be written, or its folder is a link.
        """
        image = require("PIL.Image", "report")
        mean = latents.float().mean(dim=1)
        if records[0].video != self._video or self._basis is None:
            self._video, self._basis = records[0].video, principal(mean)
        folder = below(self._run, thumbs_of(tag_in(self._run, self._process)))
        pictures = project(mean, self._basis).cpu().numpy()
        for record, picture in zip(records, pictures, strict=True):
            write_picture(image.fromarray(picture), folder / thumbnail_name(record), "png")


def picture_of(record: ChunkRecord, log: Path) -> Any | None:
    """A chunk's picture ``[H, W, 3]`` beside its log; None where there is none, or none that can be trusted."""
    path = log.parent / thumbs_of(tag_of(log)) / thumbnail_name(record)
    if not path.is_file() or not is_within(path, log.parent):
        return None
    image, numpy = require("PIL.Image", "report"), require("numpy", "report")
    try:
        with image.open(path, formats=["PNG"]) as picture:
            return numpy.asarray(picture.convert("RGB")) if max(picture.size) <= SIDE else None
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError):
        return None


def clear(folder: Path) -> None:
    """Remove the pictures that an earlier run left where this process's will lie: the page would take them for its own.

    Raises:
        ReportError: their folder is a link.
    """
    name = thumbs_of(tag_in(folder, os.getpid()))
    if os.path.lexists(folder / name):
        for picture in below(folder, name).glob("v*-c*-s*.png"):
            picture.unlink(missing_ok=True)


def _thumbnails(folder: Path | None) -> Thumbnails:
    if folder is None:
        raise TokenTrimError(
            "thumbnails need a folder; "
            "call make_observer('thumbnails', folder), the folder of JsonLines"
        )
    return Thumbnails(folder)


_thumbnails.needs = {"PIL": "pillow", "numpy": "numpy"}  # type: ignore[attr-defined]


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
