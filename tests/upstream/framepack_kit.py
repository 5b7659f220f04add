"""The conformance kit on the original FramePack; :mod:`test_framepack` runs it in a process of its own.

Two demo scripts, two directions: seven sections of three frames on a grid that is not square.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from counting import what_observing_adds
from dispatch_tools import dead_keys, watched
from framepack_script import TEXT, Loop, W, build, import_repository
from framepack_waits import FramePackWaits
from harness import folder_of
from tokentrim_hooks_adapters.framepack_original import FramePackOriginal
from torch import Tensor

KIND, SAMPLE = import_repository(str(folder_of("FramePack")))
GRID, COUNT, WIDTH = (4, 6), 24, 96


class TestForward(FramePackWaits):
    """``demo_gradio_f1.py``: history grows behind a first frame that is given."""

    adapter = FramePackOriginal
    chunks, chunk_to_prune, late_chunk = 7, 2, 5
    tokens = (0, 5, 9)
    tea: ClassVar[bool] = False

    def make_model(self) -> Any:
        return build(KIND)

    def loop(self, model: Any, seed: int) -> Loop:
        """The sampler's loop, not run yet."""
        return Loop(model, SAMPLE, WIDTH, seed)

    def run(self, model: Any, seed: int) -> Tensor:
        return self.loop(model, seed).run(self.backwards, self.chunks, self.tea)

    def reference(self, model: Any, seed: int) -> Tensor:
        loop = self.loop(model, seed)

        def hide(keys: int) -> Tensor | None:
            line = self.line(loop.section)
            dead = None if loop.section < self.chunk_to_prune else self.dead(*line)
            return torch.tensor(dead) if dead and keys == len(dead) else None

        with watched(hide):
            return loop.run(self.backwards, self.chunks, self.tea)

    def dead(self, four: list[Any], twice: list[Any], once: list[Any]) -> list[bool]:
        """Of ``[history / 4, history / 2, the pinned frame, history, the section, text]``."""

        def gone(frame: int) -> set[int]:
            return set(self.tokens) if frame < W * self.chunk_to_prune + (not self.backwards) else set()

        coarse = dead_keys([(four, 4), (twice, 2)], GRID, gone, "any")
        fine = dead_keys([(once, 1)], GRID, gone, "any")
        return coarse + [False] * COUNT + fine + [False] * (W * COUNT + TEXT)

    def line(self, section: int) -> tuple[list[Any], ...]:
        """Frames of the three parts, coarse to fine, numbered as they were made."""
        line = ([None] * 19 + list(range(1 + W * section)))[-19:]
        return line[:16], line[16:18], line[18:]


class TestBackward(TestForward):
    """``demo_gradio.py``: the last section is made first; each section's frames are in order of time."""

    backwards = True

    def line(self, section: int) -> tuple[list[Any], ...]:
        made = [W * s + f for s in range(section - 1, -1, -1) for f in range(W)]
        line = (made + [None] * 19)[:19]
        return line[3:], line[1:3], line[:1]


class TestForwardWithTeaCache(TestForward):
    """Its middle steps run no block."""

    tea = True


OPS = 86
"""Operations that observing adds to a section, at most; see tests/adapters/test_ops.py."""


def test_what_observing_adds(record_property: Any) -> None:
    """In numbers that do not depend on the machine: they may fall, they may not grow unseen."""
    own = TestForward()
    ops, syncs, log = what_observing_adds(own.make_model, lambda model: own.run(model, 0), record_property)
    assert OPS - 1 < ops <= OPS and syncs <= 1, (ops, syncs, str(log))
