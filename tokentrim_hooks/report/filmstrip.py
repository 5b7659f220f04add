"""Pictures of videos: contact sheets (rows = versions, columns = time), side-by-side frames, mp4 or gif files.

Frames go in as uint8 ``[H, W, 3]`` and are enlarged by whole factors without smoothing, so that a pixel stays a pixel.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokentrim_hooks.errors import VideoError

Frame = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in frame pixels, the last two exclusive."""

PAPER, INK, FAINT = (255, 255, 255), (25, 25, 30), (120, 120, 128)
MARK = (220, 30, 40)
"""Colour of a fault's outline."""
CUT = (255, 190, 0)
"""Colour of pruned tokens and of chunks that were regenerated."""
GAP = 6


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet: a frame, outlined boxes with their colours, a caption under it."""

    frame: Frame
    boxes: Sequence[tuple[Box, tuple[int, int, int]]] = ()
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a sheet. ``ticks`` are shares in [0, 1] of the row's time at which a mark is drawn on a line below."""

    label: str
    tiles: Sequence[Tile]
    ticks: Sequence[float] | None = None


@dataclass(frozen=True)
class Block:
    """Rows that belong together, for example one scene."""

    title: str
    rows: Sequence[Row] = field(default_factory=tuple)


def frames_of(video: Tensor) -> list[Frame]:
    """Frames of one video ``[F, 3, H, W]`` with pixels in [-1, 1] (values beyond are clipped)."""
    pixels = ((video.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return list(pixels.permute(0, 2, 3, 1).numpy())


def font(size: int) -> Any:
    """Pillow's own scalable font, so that sheets look alike everywhere."""
    return ImageFont.load_default(size)


def enlarge(tile: Tile, scale: int) -> Image.Image:
    """The tile's frame, ``scale`` times as large, with its boxes outlined."""
    height, width = tile.frame.shape[:2]
    image = Image.fromarray(tile.frame).resize((width * scale, height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for (left, top, right, bottom), color in tile.boxes:
        draw.rectangle((left * scale, top * scale, right * scale - 1, bottom * scale - 1), outline=color, width=2)
    return image


def contact_sheet(title: str, notes: Sequence[str], columns: Sequence[str], blocks: Sequence[Block]) -> Image.Image:
    """A sheet of all blocks under one heading; ``columns`` are the labels of time."""
    sheet = _Sheet(columns, blocks)
    image = Image.new("RGB", (sheet.width, sheet.height(notes)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((GAP * 2, GAP * 2), title, INK, font(19))
    y = 40
    for note in notes:
        draw.text((GAP * 2, y), note, FAINT, font(13))
        y += 19
    for block in blocks:
        y = sheet.draw_block(image, draw, block, y + GAP)
    return image


def unpatched_and_patched(
    unpatched: NDArray[Any], patched: NDArray[Any], regenerated: Sequence[float], columns: int = 7
) -> Image.Image:
    """A strip of two videos of the same noise: the same moments above one another, ticks where chunks were regenerated.

    Args:
        unpatched, patched: frames ``[F, H, W, 3]``, float in 0..1, of one size and number.
        regenerated: shares in [0, 1] of the video's time.
        columns: moments shown at most.

    Raises:
        VideoError: the videos differ in size or length.
    """
    if unpatched.shape != patched.shape:
        sizes = " against ".join(f"{v.shape[2]}x{v.shape[1]}, {v.shape[0]} frames" for v in (unpatched, patched))
        raise VideoError(f"the unpatched and the patched video differ: {sizes}; give two videos of the same noise")
    last = len(patched) - 1
    moments = sorted({round(last * i / max(columns - 1, 1)) for i in range(columns)})
    arms = (("unpatched", unpatched, None), ("patched", patched, regenerated))
    rows = [Row(name, [Tile(_small(video[m])) for m in moments], ticks) for name, video, ticks in arms]
    heads = [f"frame {moment}" for moment in moments]
    return contact_sheet("unpatched and patched", ["ticks: chunks that were regenerated"], heads, [Block("", rows)])


def _small(frame: NDArray[Any], width: int = 160) -> Frame:
    """A frame, float in 0..1, as uint8, no wider than ``width``."""
    image = Image.fromarray((255 * frame).round().clip(0, 255).astype(np.uint8))
    image.thumbnail((width, 10 * width))
    return np.asarray(image)


class _Sheet:
    """Measures of a contact sheet, in pixels."""

    LABEL, TITLE, HEAD, CAPTION, LINE = 150, 26, 20, 17, 14

    def __init__(self, columns: Sequence[str], blocks: Sequence[Block]) -> None:
        self.columns, self.blocks = columns, blocks
        height, width = blocks[0].rows[0].tiles[0].frame.shape[:2]
        self.scale = max(1, 96 // int(width))
        self.side, self.tall = int(width) * self.scale, int(height) * self.scale

    @property
    def width(self) -> int:
        return max(self.LABEL + len(self.columns) * (self.side + GAP) + GAP, 760)

    def height(self, notes: Sequence[str]) -> int:
        return 40 + 19 * len(notes) + sum(self._block(block) + GAP for block in self.blocks) + 2 * GAP

    def _block(self, block: Block) -> int:
        return (self.TITLE if block.title else 0) + self.HEAD + sum(self._row(row) for row in block.rows)

    def _row(self, row: Row) -> int:
        caption = self.CAPTION if any(tile.caption for tile in row.tiles) else 0
        return self.tall + GAP + caption + (self.LINE if row.ticks is not None else 0)

    def draw_block(self, image: Image.Image, draw: ImageDraw.ImageDraw, block: Block, y: int) -> int:
        if block.title:
            draw.text((GAP * 2, y), block.title, INK, font(15))
            y += self.TITLE
        for i, label in enumerate(self.columns):
            draw.text((self._x(i) + self.side / 2, y), label, FAINT, font(12), anchor="ma")
        y += self.HEAD
        for row in block.rows:
            self._draw_row(image, draw, row, y)
            y += self._row(row)
        return y

    def _x(self, column: int) -> int:
        return self.LABEL + column * (self.side + GAP)

    def _draw_row(self, image: Image.Image, draw: ImageDraw.ImageDraw, row: Row, y: int) -> None:
        draw.multiline_text((GAP * 2, y + self.tall / 2), row.label, INK, font(14), anchor="lm", spacing=3)
        for i, tile in enumerate(row.tiles):
            image.paste(enlarge(tile, self.scale), (self._x(i), y))
            if tile.caption:
                draw.text((self._x(i) + self.side / 2, y + self.tall + 2), tile.caption, INK, font(12), anchor="ma")
        if row.ticks is not None:
            self._draw_ticks(draw, row.ticks, y + self._row(row) - self.LINE)

    def _draw_ticks(self, draw: ImageDraw.ImageDraw, ticks: Sequence[float], y: int) -> None:
        """Tick positions are those of the columns' middles: 0 under the first tile, 1 under the last."""
        left = self._x(0) + self.side / 2
        length = (len(self.columns) - 1) * (self.side + GAP)
        draw.line((left, y + 3, left + length, y + 3), (205, 205, 210), 1)
        for tick in ticks:
            x = left + tick * length
            draw.rectangle((x - 2, y - 1, x + 2, y + 7), fill=CUT, outline=INK)


def save_video(frames: Sequence[Image.Image], path: Path, fps: int = 10) -> Path:
    """Write an mp4; where no ffmpeg can be had, a gif beside it. Returns the path written. Sides should be even."""
    try:
        importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
        imageio: Any = importlib.import_module("imageio.v2")
    except (ImportError, RuntimeError):
        return _save_gif(frames, path.with_suffix(".gif"), fps)
    writer = imageio.get_writer(path, fps=fps, codec="libx264", quality=7, macro_block_size=2)
    with writer:
        for frame in frames:
            writer.append_data(np.asarray(frame))
    return path


def _save_gif(frames: Sequence[Image.Image], path: Path, fps: int) -> Path:
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=round(1000 / fps), loop=0)
    return path


def side_by_side(header: str, names: Sequence[str], scenes: Sequence[Sequence[Tile]], across: int = 2) -> Image.Image:
    """One frame of a film: per scene one tile a version, ``across`` scenes in a line; sides are even."""
    scale = max(1, 160 // scenes[0][0].frame.shape[1])
    side = scenes[0][0].frame.shape[1] * scale
    group = len(names) * (side + 4) + 16
    lines = -(-len(scenes) // across)
    image = Image.new("RGB", (_even(group * min(across, len(scenes)) + 12), _even(60 + lines * (side + 12))), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((14, 8), header, INK, font(17))
    for number, tiles in enumerate(scenes):
        x, y = 14 + number % across * group, 58 + number // across * (side + 12)
        for i, tile in enumerate(tiles):
            if number < across:
                draw.text((x + i * (side + 4), 36), names[i], FAINT, font(14))
            image.paste(enlarge(tile, scale), (x + i * (side + 4), y))
    return image


def _even(size: int) -> int:
    return size + size % 2
