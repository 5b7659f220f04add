"""What watching a chunk of a real model costs, in numbers that do not depend on the machine.

Operations on tensors and host syncs per chunk, of every adapter that has a checkout. They may fall, and then the bound
falls; they may not grow unseen.
"""

from __future__ import annotations

import pytest
import test_kits
import test_magi1_kit
from counting import what_observing_adds
from magi1_tiny import magi1

pytestmark = pytest.mark.upstream

OPS = {
    "TestSelfForcing": 31, "TestSelfForcingWithoutSink": 31, "TestCausalForcing": 31, "TestRewardForcing": 31,
    "TestInfinityRope": 31, "TestKrea": 34, "TestLongLive": 31, "TestCausVid": 33, "TestMemFlow": 31,
    "TestMemRope": 32, "TestRollingForcing": 40, "TestRollingSink": 31, "TestMatrixGame": 37,
    "TestOneAfterTheOther": 78,
}  # fmt: skip
"""Operations per chunk at most, observing, by kit."""


def opened(name):
    """A kit's class, and its checkout."""
    kit = getattr(test_kits, name, None) or getattr(test_magi1_kit, name)
    return kit, magi1() if kit.__module__ == test_magi1_kit.__name__ else kit.opened()


@pytest.mark.parametrize("name", OPS)
def test_what_observing_adds(name, record_property):
    kit, checkout = opened(name)
    with checkout as kit.repository:
        own = kit()
        ops, syncs, log = what_observing_adds(own.make_model, lambda model: own.run(model, 0), record_property)
    assert OPS[name] - 1 < ops <= OPS[name] and syncs <= 1, (ops, syncs, str(log))
