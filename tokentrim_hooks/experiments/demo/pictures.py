"""The demo's pictures: a film and a still of each act, of the first scenes that were drawn.

The large one is the first; of a planted fault, the first in which it is pruned, and the legend says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from tokentrim_hooks.experiments.compare.rollouts import Take
from tokentrim_hooks.experiments.demo.acts import Act
from tokentrim_hooks.reference.fault import TOKENS
from tokentrim_hooks.report.files import write_picture
from tokentrim_hooks.report.filmstrip import (
    CUT,
    FAINT,
    MARK,
    Box,
    Colour,
    Tile,
    above,
    bar,
    beside,
    enlarged,
    framed,
    frames_of,
    save_film,
    strip,
    verdicts,
    words,
)  # fmt: skip
from tokentrim_hooks.report.record import ChunkRecord

SCENES = 4
"""Scenes in a picture: one large, the others small."""
COLUMNS = 8
"""Moments of a still."""
TOKEN = 4
"""Side of a token of the reference model in pixels."""
VERSIONS = ("truth", "unpatched", "pruned")
"""Of every act; behind them the policies that only some have, by name."""
PRUNED = VERSIONS.index("pruned")
LEGEND = (
    "One cell per chunk: green accepted, orange pruned and generated again, grey not judged. "
    "Orange squares: tokens pruned."
)
OF_FAULT = " Red: the planted fault."
OF_ORDER = " Large: the first of these scenes in which something is pruned."
SHORT, LONG = 90, 400
"""Milliseconds of a frame, and of one in which the large scene is pruned or its fault is planted."""


def draw_all(acts: Sequence[Act], folder: Path) -> None:
    """Write ``NAME.gif`` and ``NAME.png`` of each act into ``folder``."""
    for act in acts:
        pictures = Pictures(act)
        save_film(pictures.film(), folder / f"{act.name}.gif", pictures.milliseconds())
        write_picture(pictures.still(), folder / f"{act.name}.png", "png")


class Pictures:
    """Draws one act."""

    def __init__(self, act: Act) -> None:
        self.act, self.frames = act, act.trial.frames
        self.fault_at = act.trial.fault.last if act.trial.fault else None
        self.scenes = range(min(SCENES, len(act.trial.seeds)))
        self.versions = (*VERSIONS, *(take.outcome.setting for take in act.others))
        videos = (act.trial.scene.video, *(take.video for take in act.takes))
        records = [records_of(act.paper, scene) for scene in self.scenes]
        self._drawn = list(self.scenes) if self.fault_at is None else first_pruned_first(records)
        self._videos = [[frames_of(self._with_fault(video, scene)) for video in videos] for scene in self._drawn]
        self._records = [records[scene] for scene in self._drawn]
        self.chunks = len(self._records[0])
        self.legend = LEGEND + OF_FAULT * (self.fault_at is not None) + OF_ORDER * (self._drawn[0] > 0)

    def film(self) -> list[Image.Image]:
        """All frames: truth, unpatched and patched beside each other, the verdicts so far and to come under them."""
        return [self._moment(frame) for frame in range(self.chunks * self.frames)]

    def milliseconds(self) -> list[int]:
        """How long each frame of the film stays; the last one longest, before it begins again."""
        slow = {r.chunk for r in self._records[0] if r.pruned} | {self.fault_at}
        times = [LONG if frame // self.frames in slow else SHORT for frame in range(self.chunks * self.frames)]
        return [*times[:-1], 1500]

    def still(self) -> Image.Image:
        """The same over time: around the fault chunk by chunk, else evenly over the whole video."""
        heads = f"chunks {', '.join(map(str, self.shown()))} of {self.chunks - 1}. {self.legend}"
        strips = [[self.strip(s, v, self.versions[v], 2 if s else 3) for v in self._all()] for s in self.scenes]
        blocks = [above(rows, gap=2) for rows in strips]
        return framed(above([words(self.act.title, 18), words(heads, 12, FAINT), *blocks], gap=10))

    def shown(self) -> list[int]:
        """The chunks of a still."""
        if self.fault_at is None:
            return sorted({int(self.chunks * (i + 0.5) / COLUMNS) for i in range(COLUMNS)})
        return list(range(self.fault_at - 1, min(self.fault_at - 1 + COLUMNS, self.chunks)))

    def strip(self, scene: int, version: int, label: str, scale: int) -> Image.Image:
        """One version of a scene over time, ``scale`` times as large; under the pruned one, the verdicts."""
        chunks = self.shown()
        tiles = [self._tile(scene, version, chunk * self.frames + self.frames // 2) for chunk in chunks]
        every = self.chunks if self.fault_at is None else len(chunks)
        first = 0 if self.fault_at is None else chunks[0]
        colours = verdicts(self._records[scene])[first : first + every] if version == PRUNED else ()
        return strip(label, [enlarged(tile, scale) for tile in tiles], colours)

    def first_pruned(self) -> int | None:
        """The first scene in which the paper's policy pruned; None where it pruned in none."""
        return next((scene for scene in self.scenes if any(r.pruned for r in self._records[scene])), None)

    def _moment(self, frame: int) -> Image.Image:
        chunk = frame // self.frames
        head = f"{self.act.title}: chunk {chunk} of {self.chunks - 1}{'' if chunk else ' (given)'}"
        large = [above([words(self.versions[v], 14), enlarged(self._tile(0, v, frame), 8)], gap=2) for v in self._all()]
        shown = [self._with_bar(beside(large), 0, chunk)]
        small = [beside([enlarged(self._tile(s, v, frame), 2) for v in self._all()], gap=2) for s in self.scenes[1:]]
        shown += [beside([self._with_bar(p, s, chunk) for s, p in enumerate(small, 1)], gap=24)] if small else []
        return framed(above([words(head, 18), *shown, words(self.legend, 12, FAINT)], gap=8))

    def _all(self) -> range:
        return range(len(self.versions))

    def _with_bar(self, picture: Image.Image, scene: int, chunk: int) -> Image.Image:
        return above([picture, bar(verdicts(self._records[scene]), picture.width, chunk)], gap=2)

    def _tile(self, scene: int, version: int, frame: int) -> Tile:
        """A frame with its outlines: the fault in all versions, what was pruned in the pruned one."""
        chunk = frame // self.frames
        cuts = token_boxes(self._records[scene][chunk]) if version == PRUNED else []
        mark = [(self._fault_box(scene), MARK)] if self.fault_at is not None and chunk >= self.fault_at else []
        return Tile(self._videos[scene][version][frame], [*cuts, *mark])

    def _with_fault(self, video: Tensor, scene: int) -> Tensor:
        """A scene's video; up to the fault it shows what stood in the context: true chunks, then the corrupted one."""
        if self.fault_at is None:
            return video[scene]
        shown, first = video.clone(), self.fault_at * self.frames
        shown[:, :first] = self.act.trial.scene.video[:, :first]
        here = slice(first, first + self.frames)
        shown[:, here] = self.act.trial.blotch.paint(self.act.trial.scene.video[:, here])
        return shown[scene]

    def _fault_box(self, scene: int) -> Box:
        row, column = (int(i) for i in self.act.trial.blotch.corner[self._drawn[scene]])
        return _box(row, column, *TOKENS)


def records_of(take: Take, scene: int) -> list[ChunkRecord]:
    """A scene's records of a patched rollout, in order of chunks."""
    return sorted((r for r in take.report or () if r.sample == scene), key=lambda r: r.chunk)


def first_pruned_first(records: Sequence[Sequence[ChunkRecord]]) -> list[int]:
    """Scenes in the order in which they were drawn, but that the first one with a prune stands before all."""
    lead = next((scene for scene, found in enumerate(records) if any(r.pruned for r in found)), 0)
    return [lead, *(scene for scene in range(len(records)) if scene != lead)]


def token_boxes(record: ChunkRecord) -> list[tuple[Box, Colour]]:
    """Outlines of the tokens that were pruned for a chunk."""
    tokens = record.tokens if record.pruned else ()
    return [(_box(*divmod(token, record.grid[1]), 1, 1), CUT) for token in tokens]


def _box(row: int, column: int, rows: int, columns: int) -> Box:
    return column * TOKEN, row * TOKEN, (column + columns) * TOKEN, (row + rows) * TOKEN
