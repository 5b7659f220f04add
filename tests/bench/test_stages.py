"""What the tools say that a chunk's time and the demo's regenerations consist of adds up."""

import gc
from types import SimpleNamespace

import demo_share
import pytest
import stages

FUNCTIONS = 792
"""Functions of Python that a chunk of five calls runs into, at most: one more in each call is too many."""


def test_stages_stop_while_inner_ones_run_and_all_of_them_are_met():
    clock = stages.Clock()
    with clock.on():
        rows = stages.by_chunk(64, stages.WARM + 3, stages.observed, clock)
    ours = [stage for stage in stages.STAGES if "by hand" not in stage]
    assert all(row[stage] > 0 for row in rows for stage in ours), rows
    for row in rows:
        assert sum(row[stage] for stage in ours) < row["in all"]


def test_functions_are_as_they_were_behind_the_clock():
    before = {place: getattr(*place) for places in stages.STAGES.values() for place in places}
    with stages.Clock().on():
        assert all(getattr(*place) != was for place, was in before.items())
    assert {place: getattr(*place) for place in before} == before


def test_a_flagged_video_pays_for_its_own_calls_only():
    def record(chunk, pruned):
        own = {"video": 0, "chunk": chunk, "phases": {"refine": 4, "commit": 1}}
        return SimpleNamespace(**own, pruned=pruned, extra_calls=5 if chunk == 1 else 0)

    # Two videos, two chunks: one video is flagged in the second one.
    records = [record(0, False), record(0, False), record(1, True), record(1, False)]
    assert demo_share.flagged(records) == (1 / 4, 1 / 2, 5 / 20)


@pytest.fixture
def no_collection():
    """What the garbage collector runs at some moment is of other tests, too."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_functions_per_chunk_do_not_grow(no_collection):
    # Of CPython 3.11 and torch 2.13; later ones of Python call none for a comprehension.
    found = {tokens: stages.functions(tokens, stages.observed) for tokens in (64, 1560)}
    assert abs(found[64] - found[1560]) < 1, f"as many whatever the size: {found}"
    assert 0 < found[64] <= FUNCTIONS, found
