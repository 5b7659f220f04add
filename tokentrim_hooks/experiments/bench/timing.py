"""How long a rollout takes: CUDA events on a GPU, this process's own time on a CPU; and how fast a GPU runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
"""As ``nvidia-smi --query-gpu`` calls them."""


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Of one call of ``run``.

    On a GPU between two events on its stream, the second behind all that the rollout has launched: the time of host
    and device together, wherever one waits for the other. On a CPU the time that this process computed, because a wall
    clock measures its neighbours too.
    """
    if torch.device(device).type != "cuda":
        began = time.process_time()
        run()
        return time.process_time() - began
    with torch.cuda.device(device):
        began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        began_at.record()
        run()
        ended_at.record()
        ended_at.synchronize()
        return float(began_at.elapsed_time(ended_at)) / 1000


def clocks_of(device: str) -> str | None:
    """Clocks of a GPU, now and at most, as its driver's tool says them; None where there is no such tool."""
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", f"--id={card}"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
