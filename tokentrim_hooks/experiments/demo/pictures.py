"""The demo's pictures: two contact sheets and a side-by-side film. Scenes are the first ones drawn, never chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from tokentrim_hooks.experiments.demo.measures import fault_error
from tokentrim_hooks.experiments.demo.runs import FRAMES, Arm, Runs
from tokentrim_hooks.reference.fault import TOKENS
from tokentrim_hooks.report.filmstrip import (
    CUT,
    MARK,
    Block,
    Box,
    Row,
    Tile,
    contact_sheet,
    frames_of,
    save_video,
    side_by_side,
)

SHOWN = 3
"""Scenes on a contact sheet."""
FILMED = 4
"""Scenes in the film."""
Outline = tuple[Box, tuple[int, int, int]]


def draw_all(runs: Runs, folder: Path) -> list[Path]:
    """Write ``drift.png``, ``fault.png`` and ``side_by_side.mp4`` (or ``.gif``) into ``folder``; return their paths."""
    sheets = {"drift.png": drift_sheet(runs), "fault.png": fault_sheet(runs)}
    for name, sheet in sheets.items():
        sheet.save(folder / name)
    film = save_video(film_frames(runs), folder / "side_by_side.mp4")
    return [*(folder / name for name in sheets), film]


def drift_sheet(runs: Runs) -> Image.Image:
    """Ground truth, unpatched and TokenTrim over time; marks under TokenTrim where it pruned."""
    chunks = spread(runs.size.chunks, 11)
    base, treated = runs.drift["unpatched"], runs.drift["tokentrim"]
    blocks = []
    for scene in range(min(SHOWN, runs.size.scenes)):
        rows = [
            Row("ground truth", [_tile(runs.scene.video, scene, c) for c in chunks]),
            Row("unpatched", [_tile(base.video, scene, c) for c in chunks]),
            Row(_label(treated, scene), [_cut_tile(treated, scene, c) for c in chunks], _ticks(runs, scene)),
        ]
        blocks.append(Block(f"scene {scene + 1}", rows))
    notes = [
        "All three begin with the same given chunk; unpatched and TokenTrim also share every noise.",
        "Orange marks on the line: chunks that TokenTrim pruned and regenerated; orange squares: the tokens pruned.",
    ]
    labels = ["given" if c == 0 else f"chunk {c}" for c in chunks]
    return contact_sheet("Natural drift: what 32x32 video looks like after many chunks", notes, labels, blocks)


def fault_sheet(runs: Runs) -> Image.Image:
    """The same around the planted fault; the red outline is its place, the number the squared error around it."""
    offsets = [o for o in (-1, 0, 1, 2, 4, 8) if o <= runs.size.after]
    labels = ["1 before" if o < 0 else "the fault" if o == 0 else f"+{o}" for o in offsets]
    blocks = []
    for scene in range(min(SHOWN, runs.size.scenes)):
        truth = [_truth_tile(runs, scene, offset) for offset in offsets]
        rows = [Row("ground truth", truth)]
        for label, name in (
            ("unpatched", "unpatched"),
            ("TokenTrim,\nfault in context", "context"),
            ("TokenTrim,\nfault in chunk", "chunk"),
        ):
            rows.append(Row(label, [_fault_tile(runs, runs.fault[name], scene, offset) for offset in offsets]))
        blocks.append(Block(f"scene {scene + 1}", rows))
    notes = [
        "A blotch is written over a true chunk (red outline), then the model goes on alone: columns are chunks later.",
        "Error: squared error around the place. Orange squares: tokens that TokenTrim pruned for this chunk.",
        "Fault in context: only the cache is corrupted. Fault in chunk: so is the chunk that TokenTrim compares with.",
    ]
    return contact_sheet("Planted fault: is it caught, and does the video recover?", notes, labels, blocks)


def film_frames(runs: Runs) -> list[Image.Image]:
    """All frames of the drift part, a few scenes beside each other."""
    base, treated = runs.drift["unpatched"], runs.drift["tokentrim"]
    videos = [frames_of(v) for v in (*runs.scene.video[:FILMED], *base.video[:FILMED], *treated.video[:FILMED])]
    count = len(videos) // 3
    images = []
    for frame in range(base.video.shape[1]):
        chunk = frame // FRAMES
        scenes = [
            [
                Tile(videos[s][frame]),
                Tile(videos[count + s][frame]),
                Tile(videos[2 * count + s][frame], cuts(treated, s, chunk, whole=True)),
            ]
            for s in range(count)
        ]
        header = f"chunk {chunk} of {runs.size.chunks}" if chunk else "the given chunk"
        text = f"{header}    (orange: pruned and regenerated)"
        images.append(side_by_side(text, ["ground truth", "unpatched", "TokenTrim"], scenes))
    return images


def spread(last: int, count: int) -> list[int]:
    """At most ``count`` whole numbers from 0 to ``last``, evenly spread."""
    count = min(count, last + 1)
    return [round(last * i / max(count - 1, 1)) for i in range(count)]


def cuts(arm: Arm, scene: int, chunk: int, whole: bool = False) -> list[Outline]:
    """Outlines of the tokens pruned for a chunk of a video; with ``whole`` the frame's outline too."""
    for record in arm.report or ():
        if record.chunk == chunk and record.sample == scene and record.pruned:
            columns = record.grid[1]
            boxes = [_token_box(token // columns, token % columns) for token in record.tokens]
            frame = [_box(0, 0, *record.grid)] if whole else []
            return [(box, CUT) for box in [*boxes, *frame]]
    return []


def _label(arm: Arm, scene: int) -> str:
    count = sum(r.pruned for r in arm.report or () if r.sample == scene)
    return f"TokenTrim\n({count or 'no'} chunk{'s' * (count != 1)} pruned)"


def _ticks(runs: Runs, scene: int) -> list[float]:
    records = runs.drift["tokentrim"].report or ()
    return [r.chunk / max(runs.size.chunks, 1) for r in records if r.sample == scene and r.pruned]


def _tile(video: Tensor, scene: int, chunk: int, boxes: Sequence[Outline] = (), caption: str = "") -> Tile:
    """The middle frame of a chunk."""
    return Tile(frames_of(video[scene, chunk * FRAMES + 1 : chunk * FRAMES + 2])[0], boxes, caption)


def _cut_tile(arm: Arm, scene: int, chunk: int) -> Tile:
    return _tile(arm.video, scene, chunk, cuts(arm, scene, chunk))


def _truth_tile(runs: Runs, scene: int, offset: int) -> Tile:
    return _tile(runs.scene.video, scene, runs.size.fault_at + offset, [(_fault_box(runs, scene), MARK)])


def _fault_tile(runs: Runs, arm: Arm, scene: int, offset: int) -> Tile:
    chunk, mark = runs.size.fault_at + offset, (_fault_box(runs, scene), MARK)
    if offset == 0 and arm.planted is not None:
        return _tile(arm.planted, scene, 0, [mark], "planted")
    if offset < 0:
        return _tile(arm.video, scene, chunk)
    error = float(fault_error(runs, arm, offset)[scene])
    return _tile(arm.video, scene, chunk, [*cuts(arm, scene, chunk), mark], f"error {error:.2f}")


def _fault_box(runs: Runs, scene: int) -> Box:
    row, column = (int(i) for i in runs.blotch.corner[scene])
    return _box(row, column, *TOKENS)


def _token_box(row: int, column: int) -> Box:
    return _box(row, column, 1, 1)


def _box(row: int, column: int, rows: int, columns: int) -> Box:
    """Tokens of the reference model are 4x4 pixels."""
    return column * 4, row * 4, (column + columns) * 4, (row + rows) * 4
