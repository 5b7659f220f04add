"""tools/whole_videos.py makes videos with FastVideo's transformer, at its width. Run by :mod:`test_foreign`."""

from __future__ import annotations

import torch
from whole_models import STEPS, OfFastVideo
from whole_videos import Arm

from tokentrim_hooks.testing.policies import ForcedPolicy


def test_a_forced_trigger_prunes_and_all_phases_are_told() -> None:
    """Each of a chunk's three calls is timed, and the last one commits."""
    arm = Arm(OfFastVideo(1, (2, 2), torch.float32), [ForcedPolicy({1: [0]})], 2, (*STEPS[:2], STEPS[-1]))
    before = len(arm.records)
    assert all(len(seconds) == 3 for seconds in arm.video())
    found = arm.records[before:]
    assert [record.pruned for record in found] == [False, True] and found[1].dead
    assert all(dict(record.phases) == {"first": 1, "refine": 1, "commit": 1} for record in found)
