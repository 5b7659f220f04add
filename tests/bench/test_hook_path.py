"""The tool behind "What our own hooks take" counts what it says; no time is asserted."""

import hook_path


def test_operations_per_chunk_are_as_many_for_any_number_of_tokens():
    assert 0 < hook_path.operations(64) == hook_path.operations(1560) <= 77


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
