"""The SkyReels-V2 adapter passes the conformance kit, synchronous and with causal blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from tokentrim_hooks_adapters.skyreels_v2 import SkyReelsV2

from tests.adapters import skyreels_tiny as tiny
from tests.adapters.skyreels_reference import (
    ALL,
    InfReference,
)
from tokentrim_hooks.testing import AdapterConformance


class TestSynchronousKit(AdapterConformance):
    """Frames 0-3, then (2 3) 4 5, (4 5) 6 7, ... (12 13) 14 15: the prune of chunk 2 kills frames 4 and 5."""

    adapter = SkyReelsV2
    chunks, late_chunk = 7, 5
    settings: ClassVar[dict[str, Any]] = {"num_frames": 61, "height": 32, "width": 128}

    def make_model(self):
        return tiny.pipeline()

    def run(self, model, seed):
        return tiny.run(model, seed, **self.settings)

    def hide(self, window: int, row: int) -> dict[int, Any]:
        return {0: ALL, 1: ALL} if window == self.chunk_to_prune else {}

    def reference(self, model, seed):
        with pytest.MonkeyPatch.context() as patch:
            InfReference(patch, model, self.hide, tuple(self.tokens))
            return self.run(model, seed)


class TestCausalBlocksKit(TestSynchronousKit):
    """With guidance: one window of five blocks of 2 frames that follow each other, 3 rows each; chunk 2 from row 6."""

    chunks, late_chunk = 5, 4
    settings: ClassVar[dict[str, Any]] = {
        "num_frames": 37,
        "base_num_frames": 97,
        "overlap_history": None,
        "ar_step": 3,
        "causal_block_size": 2,
        "guidance_scale": 4.0,
    }

    def hide(self, window: int, row: int) -> dict[int, Any]:
        return dict.fromkeys(range(2 * self.chunk_to_prune), ALL) if row >= 3 * self.chunk_to_prune else {}
