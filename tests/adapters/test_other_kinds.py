"""The example adapters for kinds of models that no built-in adapter covers are on trial like any other."""

import dataclasses

import kinds
import pytest

from tokentrim_hooks.testing import failures

EXACT = "test_pruning_equals_minus_infinity"


class TestPerSite(kinds.PerSite):
    pass


class TestVelocity(kinds.Velocity):
    pass


@pytest.mark.parametrize("kit", [kinds.PerSite, kinds.Velocity])
def test_a_declared_number_of_attention_calls_is_asked_for(kit):
    """Both models attend twice a call. Who says three is refused at the first prune: a call may have been missed."""

    def saying(number):
        def context(self, call):
            return dataclasses.replace(kit.adapter.context(self, call), attentions=number)

        return type("Saying", (kit,), {"adapter": type("Adapter", (kit.adapter,), {"context": context})})

    assert failures(saying(2), [EXACT]) == {}
    assert "2 of 3 attention calls tapped" in failures(saying(3), [EXACT])[EXACT]
