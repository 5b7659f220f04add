"""The tool behind "What our own hooks take" counts what it says; no time is asserted."""

import hook_path

BOUNDS = {64: 36, 1560: 42, 3600: 49, 14400: 51}
"""Operations per chunk at most, by tokens: frames are added one by one from some 340 tokens on, from 2,049 a choice
of the largest tokens takes the place of a sort."""


def test_operations_per_chunk_do_not_grow():
    found = {tokens: hook_path.operations(tokens) for tokens in BOUNDS}
    assert all(0 < found[tokens] <= bound for tokens, bound in BOUNDS.items()), found
    # Of more than 512 tokens torch makes whole numbers: two operations on what the host has read.
    assert found[14400] - found[3600] == 2, "the same kernels, whatever the size"


def test_the_floor_is_what_a_loop_by_hand_takes():
    assert 0 < hook_path.operations(64, watched=hook_path.by_hand) <= 13


def test_syncs_before_while_and_after_something_is_dead():
    core = hook_path.syncs(0)["core"]
    assert set(core[:3]) == {1} and min(core[3:6]) > 1 and set(core[-4:]) == {1}


def test_calls_of_a_long_video_are_compared_with_a_short_one_s(monkeypatch):
    monkeypatch.setattr(hook_path, "WINDOWS", 12)
    monkeypatch.setattr(hook_path, "SHORT", 4)
    monkeypatch.setattr(hook_path, "EVERY", 4)
    first, last = hook_path.windows(0)
    assert first > 0 and last > 0


def test_a_chunk_s_time_is_a_number():
    assert isinstance(hook_path.milliseconds(64, 8), float)
