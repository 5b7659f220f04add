"""Where the time of a rollout goes: the scopes that tokentrim marks for torch's profiler, and the rest, the model's.

The same scopes stand in anybody's own trace: ``torch.profiler.profile`` shows them by these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

PREFIX = "tokentrim."
"""How the names of our scopes begin; what is left says what is done in them."""
MODEL = "model and sampler"
WHOLE = f"{PREFIX}{MODEL}"


def profile(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Share of each scope in one rollout of a model that the caller patches inside ``run``; they add up to 1.

    A scope within another counts for itself only. Host time, for host time is what tokentrim adds; profiling slows
    every operator, so shares are for telling parts apart.
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(WHOLE):
        run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
    seconds: dict[str, float] = {MODEL: 0.0}
    for event in profiler.events() or ():
        if event.name.startswith(PREFIX):
            name, others = event.name.removeprefix(PREFIX), sum(inner.cpu_time_total for inner in _within(event))
            seconds[name] = seconds.get(name, 0.0) + event.cpu_time_total - others
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()}


def _within(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The next scopes of ours below a scope."""
    for child in event.cpu_children:
        if child.name.startswith(PREFIX):
            yield child
        else:
            yield from _within(child)
