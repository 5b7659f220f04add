"""A run that is killed, at any moment and without warning, leaves a log that can be read and drawn."""

import json
import subprocess
import sys
import time

import pytest

from tokentrim_hooks.cli.main import main
from tokentrim_hooks.report.record import read_report

ENDLESS = """
import torch
import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.pipeline import ReferencePipeline

pipeline = ReferencePipeline.random(grid=(2, 2))
tokentrim.patch(pipeline, tokentrim.DriftPolicy(sensitivity=0.0), observers=[tokentrim.JsonLines("log")])
while True:
    pipeline.inference(torch.randn(1, 30, 3, 8, 8))
"""


def lines_of(log):
    return log.read_text().count("\n") if log.is_file() else 0


@pytest.mark.parametrize("chunks", [1, 7, 23])
def test_killed_without_warning(tmp_path, chunks):
    log = tmp_path / "log" / "chunks.jsonl"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=tmp_path)
    try:
        give_up = time.monotonic() + 120
        while lines_of(log) < chunks:
            assert process.poll() is None and time.monotonic() < give_up, "the run ended or wrote nothing"
            time.sleep(0.002)
    finally:
        process.kill()  # SIGKILL: no handler, no flush, no atexit
        process.wait()
    whole = log.read_text().split("\n")[:-1]
    assert len(whole) >= chunks and all(json.loads(line)["frames"] == 3 for line in whole)
    assert len(read_report(tmp_path / "log")) >= len(whole)
    assert main(["report", str(tmp_path / "log")]) == 0
    assert "control chart" in (tmp_path / "log" / "report.html").read_text()
