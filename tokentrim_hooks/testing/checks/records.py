"""Whether records tell of a run as it was: chunks in order, and every call."""

from __future__ import annotations

import itertools

from tokentrim_hooks.report.record import Report


def check_records(report: Report, chunks: int, overlap: int = 0, backwards: bool = False) -> None:
    """Assert that the first sample's records tell of ``chunks`` chunks of one video, in order.

    Each shares ``overlap`` latent frames with the one before, and lies behind it, or before it if ``backwards``.
    """
    records = [record for record in report if record.sample == 0]
    assert len(records) == chunks >= 5, f"{len(records)} chunks were recorded, the run has {chunks} (at least 5)"
    assert {record.video for record in records} == {0}, "one run was taken for several videos"
    assert [record.chunk for record in records] == list(range(chunks))
    for before, after in itertools.pairwise(records):
        adjoins = before.start - after.frames if backwards else before.start + before.frames
        expected = adjoins + (overlap if backwards else -overlap)
        assert after.start == expected, f"chunk {after.chunk} starts at frame {after.start}, expected {expected}"
    firsts = [record.phases.get("first", 0) for record in records]
    assert firsts == [1] * chunks, f"FIRST calls per chunk: {firsts}, expected one each"
    assert len({tuple(sorted(record.phases.items())) for record in records[1:-1]}) == 1, "phases vary by chunk"
    judged = [record.severity is not None for record in records]
    assert judged == [False] + [True] * (chunks - 1), f"judged chunks: {judged}"


def check_calls(report: Report, calls: int) -> None:
    """Assert that the first sample's records know each of the denoiser's calls, or each but for guidance's branches."""
    known = sum(sum(record.phases.values()) for record in report if record.sample == 0)
    assert known and calls % known == 0, f"{calls} denoiser calls, of which {known} were classified"
