"""What a policy hides from single calls, on forks that nobody has published: -inf at these keys, or refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from test_forks_with_a_twist import (
    EXACT,
    NO_ROWS,
    Clamped,
    KeptInRing,
    KeysThenValues,
    SinksElsewhere,
    ZeroedInTheFirstHead,
)
from test_invented_forks import (
    CHUNK,
    FramesApart,
    HeadsApartInAll,
    KeepsMore,
    Numbered,
    ReadsEverySecond,
    ReadsLess,
    TwoKernels,
    numbered,
    rollout,
)
from test_memory_made_of_rows import home
from test_unknown_forks import TOKENS, SelfAttention, cache_of, plain_attention
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import UnsupportedContextError
from tokentrim_hooks.policy.commit_window import CommitWindow

assert home  # the fixture that gives the fork's attention a namespace


LOSES_MARKS = (Clamped, KeysThenValues, ZeroedInTheFirstHead, KeptInRing)


@pytest.mark.parametrize("kind", LOSES_MARKS, ids=lambda kind: kind.__name__)
def test_what_is_hidden_is_found_by_attention_or_refused(kind: type[SelfAttention]) -> None:
    """A mark that is clamped makes another video, of what it was clamped to."""
    fork, words = numbered(kind), "rows that are hidden from a call"
    with tokentrim.patched(fork, CommitWindow(3)), pytest.raises(UnsupportedContextError, match=words):
        rollout(fork, cache_of())


class TwoOfAnotherLength(Numbered):
    """All rows are attended first, then the halves of the latest ones: those two have equally many keys."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        old = len(numbers) - CHUNK
        if old < CHUNK:
            return super().read(q, k, v, numbers)
        parts = [(k[:, some], v[:, some], numbers[some]) for some in (slice(None), slice(CHUNK), slice(old, None))]
        return sum(super(TwoOfAnotherLength, self).read(q, *part) for part in parts) / 3  # type: ignore[return-value]


HIDDEN_ELSEWHERE = {
    TwoKernels: "different rows in the same places",
    TwoOfAnotherLength: "different rows in the same places",
    FramesApart: "different rows in the same places",
    HeadsApartInAll: NO_ROWS,
    SinksElsewhere: NO_ROWS,
    KeepsMore: "a layer sees 24 keys where 16 are known",
}


@pytest.mark.parametrize("kind", HIDDEN_ELSEWHERE, ids=lambda kind: kind.__name__)
def test_rows_are_hidden_of_all_keys_or_the_fork_is_refused(kind: type[SelfAttention]) -> None:
    """Other rows were hidden than those that were meant, or not all: off by 2e-4 to 1e-3."""
    fork = numbered(kind)
    with tokentrim.patched(fork, CommitWindow(3)), pytest.raises(UnsupportedContextError, match=HIDDEN_ELSEWHERE[kind]):
        rollout(fork, cache_of())


def hidden_by_hand(kind: type[SelfAttention], home: types.ModuleType, frames: int) -> Tensor:
    """With -inf in commits at all but the latest ``frames``."""
    calls = 0

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chunk, step = divmod(calls - 1, 3)
        gone = (Numbered.now < (chunk * 2 + 2 - frames) * TOKENS) & (Numbered.now >= 0) & (step == 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(gone, float("-inf")).softmax(-1), v)

    def counted(cache: Any) -> Any:
        nonlocal calls
        calls += 1
        return cache

    home.attention = attention  # type: ignore[attr-defined]
    video = rollout(numbered(kind), cache_of(), before_call=counted)
    home.attention = plain_attention  # type: ignore[attr-defined]
    return video


@pytest.mark.parametrize("kind", (ReadsLess, ReadsEverySecond, *EXACT), ids=lambda kind: kind.__name__)
def test_what_is_hidden_equals_minus_infinity(kind: type[SelfAttention], home: types.ModuleType) -> None:
    fork, expected = numbered(kind), hidden_by_hand(kind, home, 3)
    with tokentrim.patched(fork, CommitWindow(3)):
        ours = rollout(fork, cache_of())
    assert float((ours - rollout(numbered(kind), cache_of())).abs().max()) > 1e-4
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)
