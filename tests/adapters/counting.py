"""Counts what does not depend on the machine: operations on tensors, and host syncs, with a policy and without.

The model's own are counted in the same run of the same model without a patch, and taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch.nn.attention.flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import SyncLog, count_syncs


class Counter(TorchDispatchMode):
    """Counts operations that reach a kernel; flex attention is one, whatever it is made of."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def uncompiled() -> Any:
    """Keep flex attention from having itself compiled, under modes that the compiler does not know."""
    return mock.patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, create=True)


def added_ops(make: Callable[[], Any], run: Callable[[Any], Any], **options: Any) -> float:
    """Operations per chunk that observing adds. ``options`` are those of ``patch``."""
    plain, pipeline = make(), make()
    with uncompiled():
        run(make())  # what the model computes once for all of its kind, as rotary tables, is nobody's
    with uncompiled(), Counter() as own:
        run(plain)
    patched = tokentrim.patched(pipeline, tokentrim.ObservePolicy(), **options)
    with uncompiled(), Counter() as watched, patched as handle:
        run(pipeline)
    return (watched.count - own.count) / len({record.chunk for record in handle.report})


def syncs_of_rollout(make: Callable[[], Any], run: Callable[[Any], Any], **options: Any) -> tuple[float, SyncLog]:
    """Host syncs of the rollout per chunk, observing: one is the design's. And all of them, to be shown.

    What an adapter reads of indices that live on the host stalls no device, and is not counted.
    """
    pipeline = make()
    patched = tokentrim.patched(pipeline, tokentrim.ObservePolicy(), **options)
    with uncompiled(), patched as handle, count_syncs() as log:
        run(pipeline)
    found = sum(event.ours and "rollout/" in event.place for event in log.events)
    return found / len({record.chunk for record in handle.report}), log


def what_observing_adds(
    make: Callable[[], Any], run: Callable[[Any], Any], record_property: Callable[[str, object], None], name: str = ""
) -> tuple[float, float, SyncLog]:
    """:func:`added_ops` and :func:`syncs_of_rollout`, recorded as the test's figure."""
    ops, (syncs, log) = added_ops(make, run), syncs_of_rollout(make, run)
    label = f"{name}: " if name else ""
    record_property("figure", f"{label}{ops:.1f} operations and {syncs:.2f} host syncs per chunk")
    return ops, syncs, log
