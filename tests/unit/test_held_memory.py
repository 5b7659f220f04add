"""What the kit counts as kept: the memory of real tensors, whatever else a process has lying about."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokentrim_hooks.testing.checks.memory import held


def test_tensors_without_memory_count_for_nothing():
    """A compiler leaves fake tensors behind, whose storage has no address."""
    before = held()
    with FakeTensorMode():
        fake = torch.empty(1 << 20)
    others = [fake, torch.empty(1 << 20, device="meta"), torch.eye(3).to_sparse()]
    assert held() - before < 1 << 10, others
    real = torch.empty(1 << 20)
    assert held() - before >= real.nbytes and held(besides=(real,)) - before < 1 << 10
