"""What calls that are made again to prove a fork leave behind: all is put back, or it is said that it was too large."""

from __future__ import annotations

import types

import pytest
import torch
from test_forks_with_a_twist import Cache
from test_invented_forks import InTiles, Numbered, numbered, reference, rollout
from test_memory_made_of_rows import home
from test_unknown_forks import DEAD, cache_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import TokenTrimWarning, UnsupportedContextError
from tokentrim_hooks.rollout.repeat import snapshot
from tokentrim_hooks.testing import ForcedPolicy

assert home  # the fixture that gives the fork's attention a namespace


class RollsInEveryCall(Numbered):
    """Whether it has been made before or not."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        cache["global_end_index"].fill_(start)
        return super().write(k, v, cache, start)


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is more than is copied before a call is made once more; its counters are not."""
    monkeypatch.setattr(snapshot, "BUDGET", 1024)


@pytest.mark.usefixtures("too_large")
def test_a_large_cache_is_as_it_was_after_the_calls_that_prove_it(home: types.ModuleType) -> None:
    fork, expected = numbered(Numbered), reference(Numbered, home, 4)
    with tokentrim.patched(fork, ForcedPolicy({4: DEAD})):
        assert torch.allclose(rollout(fork, cache_of()), expected, atol=1e-5, rtol=0)
    fork, words = numbered(InTiles), "another order than its tokens"
    with tokentrim.patched(fork, ForcedPolicy({4: DEAD})), pytest.raises(UnsupportedContextError, match=words):
        rollout(fork, cache_of())


@pytest.mark.usefixtures("too_large")
def test_what_cannot_be_put_back_is_said() -> None:
    """The refused call was made again, and its cache has rolled on."""
    fork = numbered(RollsInEveryCall)
    with (
        pytest.warns(TokenTrimWarning, match="this video may go on otherwise than unpatched"),
        tokentrim.patched(fork, ForcedPolicy({4: DEAD}), on_error="warn"),
    ):
        rollout(fork, cache_of())


def test_what_can_be_is_put_back() -> None:
    fork, plain = numbered(RollsInEveryCall), rollout(numbered(RollsInEveryCall), cache_of())
    with (
        pytest.warns(TokenTrimWarning, match=r"override Adapter\.replay\.$"),
        tokentrim.patched(fork, ForcedPolicy({4: DEAD}), on_error="warn"),
    ):
        assert torch.equal(rollout(fork, cache_of()), plain)
