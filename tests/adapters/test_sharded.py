"""FSDP2 around a denoiser that was patched before: its casts come first at the first call, and change nothing.

Of diffusers' models: a KV cache that a model writes in place is lost to FSDP2's casting, patched or not.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from targets import TARGETS
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A process group of one."""
    place = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def told(handle):
    return [(r.video, r.chunk, r.start, r.severity, r.pruned, r.dead) for r in handle.report]


@pytest.mark.parametrize("target", TARGETS[1:], ids=lambda target: target.name)
def test_patched_then_sharded_is_sharded_then_patched(target):
    first = target.make()
    fully_shard(target.denoiser(first), mp_policy=LOW)
    with tokentrim.patched(first, POLICY) as handle:
        right, wanted = target.run(first), told(handle)
    second = target.make()
    with tokentrim.patched(second, POLICY) as handle:
        fully_shard(target.denoiser(second), mp_policy=LOW)
        assert torch.equal(target.run(second), right)
    assert told(handle) == wanted and handle.report.triggers == 1
