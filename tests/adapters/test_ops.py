"""What watching a chunk costs, in numbers that do not depend on the machine: operations on tensors, and host syncs.

They may fall, and then the bound here falls; they may not grow unseen. The model's own are counted in the same run of
the same model without a patch, and taken off.
"""

from __future__ import annotations

import pytest
from targets import TARGETS
from torch.utils._python_dispatch import TorchDispatchMode

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import count_syncs

OPS = {"self-forcing": 67, "skyreels-v2": 78, "framepack": 68, "helios": 67, "ltx-long": 95}
"""Operations per chunk at most, observing. Not AnyFlow: its flex attention runs under no counter of operations."""
COUNTED = [target for target in TARGETS if target.name in OPS]


class Counter(TorchDispatchMode):
    """Counts operations that reach a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def ops_of(target, policy):
    """Operations of a run, and its chunks."""
    pipeline = target.make()
    with Counter() as counter:
        if policy is None:
            target.run(pipeline)
            return counter.count, 0
        with tokentrim.patched(pipeline, policy) as handle:
            target.run(pipeline)
        return counter.count, len({record.chunk for record in handle.report})


@pytest.mark.parametrize("target", COUNTED, ids=lambda target: target.name)
def test_operations_per_chunk_do_not_grow(target):
    own, _ = ops_of(target, None)
    watched, chunks = ops_of(target, tokentrim.ObservePolicy())
    assert 0 < (watched - own) / chunks <= OPS[target.name]


@pytest.mark.parametrize("target", COUNTED, ids=lambda target: target.name)
def test_one_synchronisation_per_chunk(target):
    pipeline = target.make()
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle, count_syncs() as log:
        target.run(pipeline)
    chunks = len({record.chunk for record in handle.report})
    # Those of the rollout: what an adapter reads of indices that live on the host stalls no device.
    assert sum(event.ours and "rollout/" in event.place for event in log.events) <= chunks, str(log)
