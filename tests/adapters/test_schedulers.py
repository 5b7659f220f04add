"""The scheduler is the one that the pipeline has at the call, not the one that it had when it was patched."""

from __future__ import annotations

import functools

import pytest
import torch
from targets import TARGETS

import tokentrim_hooks as tokentrim

WITH_A_SCHEDULER = [target for target in TARGETS if target.name in ("skyreels-v2", "framepack", "helios")]


def shifted(pipeline):
    """Another scheduler, derived from the pipeline's, that begins at a lower noise level."""
    kind = type(pipeline.scheduler)

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        kind.set_timesteps(self, *args, **kwargs)
        self.sigmas = self.sigmas * 0.8

    lower = type("Lower" + kind.__name__, (kind,), {"set_timesteps": set_timesteps})
    return lower.from_config(pipeline.scheduler.config)


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
