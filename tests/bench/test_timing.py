"""What a rollout takes on a GPU, by events that stand in for a card's: none is at hand where this runs."""

import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tokentrim_hooks.experiments.bench import timing


class Card:
    """Of ``torch.cuda`` what timing asks for. Its clock moves when something runs on it; ``done`` is in order."""

    def __init__(self):
        self.now, self.done = 0.0, []
        self.device = mock.MagicMock()

    def synchronize(self):
        self.done.append("wait")

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record():
            event.at = self.now
            self.done.append("record")

        event.record, event.synchronize = record, lambda: self.done.append("end")
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def run(self):
        self.now += 250.0  # ms
        self.done.append("run")


def test_a_rollout_on_a_gpu_lies_between_two_events():
    card = Card()
    with mock.patch.object(torch, "cuda", card):
        assert timing.seconds_of(card.run, "cuda:1") == 0.25
    assert card.done == ["wait", "record", "run", "record", "end"]
    card.device.assert_called_once_with("cuda:1")


def test_on_a_cpu_sleep_takes_no_time():
    began = time.perf_counter()
    assert timing.seconds_of(lambda: time.sleep(0.2), "cpu") < 0.1 < time.perf_counter() - began


@pytest.mark.parametrize("there", [True, False])
def test_clocks_are_what_the_driver_says_or_nothing(tmp_path, monkeypatch, there):
    tool = tmp_path / "nvidia-smi"
    if there:
        tool.write_text('#!/bin/sh\necho "1980 MHz, $2 $3"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with mock.patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab")):
        found = timing.clocks_of("cuda")
    assert found == ("1980 MHz, --format=csv,noheader --id=GPU-12-ab" if there else None)
