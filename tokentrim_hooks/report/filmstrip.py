"""Pictures of videos, put together from parts: a frame, a line of words, a bar of verdicts, beside or above others.

Frames go in as uint8 ``[H, W, 3]`` and are enlarged by whole factors without smoothing, so that a pixel stays a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokentrim_hooks.errors import VideoError
from tokentrim_hooks.metrics.clips import Clip, clip_of
from tokentrim_hooks.metrics.frames import Frames
from tokentrim_hooks.report.files import write_picture
from tokentrim_hooks.report.record import ChunkRecord

Frame = NDArray[np.uint8]
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in frame pixels, the last two exclusive."""

PAPER, INK, FAINT = (255, 255, 255), (25, 25, 30), (120, 120, 128)
MARK = (220, 30, 40)
"""Colour of a fault's outline."""
CUT = (255, 190, 0)
"""Colour of pruned tokens and of chunks that were regenerated."""
KEPT, UNJUDGED = (96, 160, 110), (205, 205, 210)
"""Colours of chunks that were accepted as they came, and of those without a verdict."""
GAP = 6


@dataclass(frozen=True)
class Tile:
    """A frame, and outlined boxes with their colours."""

    frame: Frame
    boxes: Sequence[tuple[Box, Colour]] = ()


# ---------------------------------------------------------------------------------------------- parts


def frames_of(video: Tensor) -> list[Frame]:
    """Frames of one video ``[F, 3, H, W]`` with pixels in [-1, 1] (values beyond are clipped)."""
    pixels = ((video.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return list(pixels.permute(0, 2, 3, 1).numpy())


def enlarged(tile: Tile, scale: int) -> Image.Image:
    """The tile's frame, ``scale`` times as large, with its boxes outlined."""
    height, width = tile.frame.shape[:2]
    image = Image.fromarray(tile.frame).resize((width * scale, height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for (left, top, right, bottom), colour in tile.boxes:
        corners = (left * scale, top * scale, right * scale - 1, bottom * scale - 1)
        draw.rectangle(corners, outline=colour, width=max(1, scale // 3))
    return image


def words(text: str, size: int = 13, colour: Colour = INK, width: int = 0) -> Image.Image:
    """Text as a picture, ``width`` pixels wide at least; in Pillow's own font, so that it looks alike everywhere."""
    font = ImageFont.load_default(size)
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text or " ", font)
    lines = text.count("\n") + 1
    image = Image.new("RGB", (max(width, int(box[2]) + 1), lines * (size + 4)), PAPER)
    ImageDraw.Draw(image).multiline_text((0, 0), text, colour, font)
    return image


def bar(colours: Sequence[Colour], width: int, now: int | None = None, height: int = 8) -> Image.Image:
    """One cell per colour over ``width`` pixels; cell ``now`` is marked."""
    image = Image.new("RGB", (width, height + 4), PAPER)
    draw = ImageDraw.Draw(image)
    edges = [round(width * i / max(len(colours), 1)) for i in range(len(colours) + 1)]
    for i, colour in enumerate(colours):
        draw.rectangle((edges[i], 2, edges[i + 1] - 2, height + 1), fill=colour)
        if i == now:
            draw.rectangle((edges[i], 0, edges[i + 1] - 2, height + 3), outline=INK, width=2)
    return image


def beside(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Pictures in a line, their upper edges level."""
    image = Image.new("RGB", (_total([p.width for p in pictures], gap), max(p.height for p in pictures)), PAPER)
    x = 0
    for picture in pictures:
        image.paste(picture, (x, 0))
        x += picture.width + gap
    return image


def above(pictures: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Pictures under one another, their left edges in line."""
    image = Image.new("RGB", (max(p.width for p in pictures), _total([p.height for p in pictures], gap)), PAPER)
    y = 0
    for picture in pictures:
        image.paste(picture, (0, y))
        y += picture.height + gap
    return image


def framed(picture: Image.Image, margin: int = 2 * GAP) -> Image.Image:
    """A picture with paper around it, and even sides: some video formats want them."""
    sides = [size + 2 * margin + size % 2 for size in picture.size]
    image = Image.new("RGB", (sides[0], sides[1]), PAPER)
    image.paste(picture, (margin, margin))
    return image


def _total(sizes: Sequence[int], gap: int) -> int:
    return sum(sizes) + gap * (len(sizes) - 1)


# ---------------------------------------------------------------------------------------------- whole pictures


def verdicts(records: Sequence[ChunkRecord]) -> list[Colour]:
    """One colour per chunk, of the records of one sample of one video."""
    return [CUT if r.pruned else UNJUDGED if r.severity is None else KEPT for r in records]


def strip(label: str, tiles: Sequence[Image.Image], colours: Sequence[Colour] = ()) -> Image.Image:
    """A line of pictures over time behind their label; the bar of ``colours`` under it is the whole of that time."""
    line = beside(tiles)
    picture = above([line, bar(colours, line.width)], gap=2) if colours else line
    return beside([words(label.replace(" + ", "\n+ "), 14, width=140), picture])


def unpatched_and_patched(
    unpatched: Frames | Clip, patched: Frames | Clip, colours: Sequence[Colour], columns: int = 7
) -> Image.Image:
    """Two videos of the same noise, the same moments above one another, and the verdicts of the chunks.

    Args:
        unpatched, patched: frames ``[F, H, W, 3]``, float in 0..1, or clips, of one size and number.
        colours: one per chunk, see :func:`verdicts`.
        columns: moments shown at most.

    Raises:
        VideoError: the videos differ in size or length, or cannot be read.
    """
    clips = [clip_of(video) for video in (unpatched, patched)]
    counts = [clip.count() for clip in clips]
    # The middles of equal parts, so that a chunk's cell of the bar lies under what was shown then.
    moments = sorted({int(min(counts) * (i + 0.5) / columns) for i in range(columns)})
    shown = [clip.pick(moments) for clip in clips]
    shapes = [next(iter(frames.values())).shape for frames in shown]
    if counts[0] != counts[1] or shapes[0] != shapes[1]:
        sizes = " against ".join(f"{s[1]}x{s[0]}, {count} frames" for s, count in zip(shapes, counts, strict=True))
        raise VideoError(f"the unpatched and the patched video differ: {sizes}; give two videos of the same noise")
    rows = [
        strip(name, [_small(frames[m]) for m in moments], bars)
        for name, frames, bars in (("unpatched", shown[0], ()), ("patched", shown[1], colours))
    ]
    return framed(above([words(f"frames {', '.join(map(str, moments))}", 12, FAINT), *rows]))


def _small(frame: Frame, width: int = 160) -> Image.Image:
    """A frame enlarged to at least 96 pixels, or shrunk to ``width`` at most."""
    image = enlarged(Tile(frame), max(1, 96 // frame.shape[1]))
    image.thumbnail((width, 10 * width))
    return image


def save_film(frames: Sequence[Image.Image], path: Path, milliseconds: Sequence[int]) -> Path:
    """Write frames as a GIF that plays over and over, each as long as it says; returns the path."""
    # No dithering, and one palette for the whole film: what does not change costs no bytes, and no colour flickers.
    palette = _palette(frames)
    reduced = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    film: dict[str, Any] = {"save_all": True, "append_images": reduced[1:], "duration": list(milliseconds), "loop": 0}
    return write_picture(reduced[0], path, "gif", **film)


def _palette(frames: Sequence[Image.Image], samples: int = 8) -> Image.Image:
    """256 colours that come near to all in some frames: the mean of many greys must not cost a small sprite its own."""
    chosen = frames[:: max(1, len(frames) // samples)]
    small = [f.resize((f.width // 3 or 1, f.height // 3 or 1), Image.Resampling.NEAREST) for f in chosen]
    return above(small).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
