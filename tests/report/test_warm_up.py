"""Whether a chunk was judged in the warm-up: its line says so, also where it was above a threshold already."""

from dataclasses import replace

import pytest

from tokentrim_hooks.report.observers import ProgressLine, progress_line
from tokentrim_hooks.report.record import ChunkRecord
from tokentrim_hooks.report.warm_up import WarmUp, least_of


def record(chunk, severity, threshold, sample=0):
    return ChunkRecord(video=0, chunk=chunk, sample=sample, start=chunk, frames=1, phases={}, severity=severity,
                       threshold=threshold, grid=(2, 2))  # fmt: skip


RUN = [record(0, None, None), record(1, 2.0, None), record(2, 3.0, 2.5), record(3, 3.0, 2.9), record(4, 1.0, 2.9)]


@pytest.mark.parametrize(("warmup", "held"), [(0, [1]), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), ("no", [1])])
def test_as_many_severities_as_the_policy_waits_for(warmup, held):
    warm_up = WarmUp({"policy.warmup": warmup})
    assert [one.chunk for one in RUN if warm_up.holds(one)] == held


def test_a_new_scene_and_another_sample_warm_up_anew():
    warm_up = WarmUp({"policy.warmup": 2})
    twice = [*RUN[1:], record(5, 1.0, None), record(6, 2.0, 1.0), record(7, 2.0, 1.0)]
    assert [one.chunk for one in twice if warm_up.holds(one)] == [1, 2, 5, 6]
    both = [one for pair in zip(RUN, (replace(r, sample=1) for r in RUN), strict=True) for one in pair]
    warm_up = WarmUp({"policy.warmup": 2})
    assert [(one.chunk, one.sample) for one in both if warm_up.holds(one)] == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("setting", [True, -1, 2.0, None, [2]])
def test_settings_may_hold_anything(setting):
    assert least_of({"policy.warmup": setting}) == 0 and least_of({}) == 0


def test_the_line_says_why_a_chunk_above_its_threshold_was_accepted(capsys):
    line = ProgressLine()
    line.on_start({"policy.warmup": 2})
    for one in RUN:
        line.on_chunk([one], None)
    tails = [said.rpartition("  ")[2] for said in capsys.readouterr().err.splitlines()]
    warming, above = "accepted, warming up", "accepted, though above it"
    assert tails == ["not judged", warming, warming, above, "accepted"]
    assert progress_line([replace(RUN[3], pruned=True, tokens=(1,))]).endswith("pruned 1/4 tokens")
