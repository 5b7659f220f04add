"""The scheduler is the one that the pipeline has at the call, not the one that it had when it was patched."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from targets import TARGETS

import tokentrim_hooks as tokentrim

WITH_A_SCHEDULER = [target for target in TARGETS if target.name in ("skyreels-v2", "framepack", "helios")]


def shifted(pipeline):
    """Another scheduler of the same class, whose noise levels are others."""
    old = pipeline.scheduler
    if isinstance(old, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler(shift=9.0)
    key = "flow_shift" if "flow_shift" in old.config else "shift"
    return type(old).from_config({**old.config, key: 9.0, "use_dynamic_shifting": False})


def severities(target, pipeline, handle):
    video = target.run(pipeline)
    return video, [record.severity for record in handle.report][-3:]


@pytest.mark.parametrize("target", WITH_A_SCHEDULER, ids=lambda target: target.name)
def test_a_scheduler_put_in_after_the_patch_gives_the_severities(target):
    right = target.make()
    right.scheduler = shifted(right)
    with tokentrim.patched(right, tokentrim.ObservePolicy()) as handle:
        video, expected = severities(target, right, handle)
    pipeline = target.make()
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle:
        _, before = severities(target, pipeline, handle)
        pipeline.scheduler = shifted(pipeline)
        again, after = severities(target, pipeline, handle)
    assert torch.equal(again, video) and after == expected
    assert after != before
