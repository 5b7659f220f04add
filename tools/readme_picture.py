"""docs/pictures/readme.png: the first screen's two strips, from the demo's own rollouts.

``python tools/readme_picture.py`` rolls the demo's acts out for a few scenes (three minutes on one core). Scenes are
drawn in order of their seeds: of the fault, the first one in which the paper's policy prunes (it misses one of four);
of slow drift, the first one.
"""

from __future__ import annotations

import functools
from pathlib import Path

from PIL import Image

from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
from tokentrim_hooks.experiments.demo.acts import Act, Size, play
from tokentrim_hooks.experiments.demo.pictures import PRUNED, SCENES, Pictures
from tokentrim_hooks.report.filmstrip import FAINT, above, framed, words

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "readme.png"
MOST = 150_000
"""Bytes of the picture."""


def main() -> None:
    """Roll out, draw, write."""
    load = functools.partial(ReferenceMaker.load, sink=None, trained=True, device="cpu")
    fault, burning, _ = play(load, Size(scenes=SCENES), lambda *_: None)
    caught = Pictures(fault).first_pruned()
    assert caught is not None, "the paper's policy pruned in none of these scenes: there is nothing to show"
    title = "A planted fault (outlined in red), chunk by chunk. Orange squares: the tokens pruned."
    blocks = [
        block(fault, caught, PRUNED, "pruned (DriftPolicy)", title),
        block(burning, 0, -1, "CommitWindow + RowMoments", "Slow drift, every fourth chunk of 30. No token is pruned."),
    ]
    picture = framed(above(blocks, gap=14)).quantize(128, dither=Image.Dither.NONE)
    picture.save(PICTURE, optimize=True)
    assert PICTURE.stat().st_size < MOST, f"{PICTURE.name} has {PICTURE.stat().st_size} bytes"


def block(act: Act, scene: int, version: int, label: str, title: str) -> Image.Image:
    """Truth, the model as it is, and the version that helps."""
    pictures = Pictures(act)
    shown = {0: "truth", 1: "unpatched", version: label}
    rows = [pictures.strip(scene, number, name, scale=3) for number, name in shown.items()]
    return above([words(title, 13, FAINT), *rows], gap=2)


if __name__ == "__main__":
    main()
