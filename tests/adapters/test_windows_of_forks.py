"""Windows that forks invent, where nothing else of them is new: exact under a policy that prunes or hides, or refused.

Frames leave from the middle, the window shrinks, keys are turned by their place or read in another order, a chunk is
written late: rows are followed by their content, and places are asked of the adapter at every call.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from test_forks_with_a_twist import NO_ROWS
from test_hidden_on_forks import NewestFirst, hidden_by_hand
from test_invented_forks import CHUNK, Numbered, numbered, reference, rollout
from test_memory_made_of_rows import WINDOW, home
from test_unknown_forks import DEAD, HEADS, TOKENS, SelfAttention, cache_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import UnsupportedContextError
from tokentrim_hooks.policy.commit_window import CommitWindow
from tokentrim_hooks.testing import ForcedPolicy

assert home  # the fixture that gives the fork's attention a namespace
Cache = dict[str, Any]


class TurnedByPlace(Numbered):
    """K is kept as it is, and turned by its place in the window as it is read, as by a relative RoPE."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        angle = torch.arange(k.shape[1], dtype=torch.float32)[:, None, None] / 3
        a, b = k.chunk(2, -1)
        turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
        return super().read(q, turned, v, numbers)


class Shrinks(Numbered):
    """The window becomes smaller in the middle of a video."""

    start = 0

    def window(self) -> int:
        return WINDOW if self.start < 4 * CHUNK else 2 * CHUNK

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        self.start = start
        return super().write(k, v, cache, start)


class Thins(Numbered):
    """Of a full window the second frame leaves, not the first: what is long ago is kept ever more thinly."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        filled, end = int(cache["local_end_index"]), start + CHUNK
        if end > int(cache["global_end_index"]):
            while filled + CHUNK > self.window():
                for rows in (cache["k"][0], cache["v"][0], self.numbers):
                    rows[TOKENS : filled - TOKENS] = rows[2 * TOKENS : filled].clone()
                filled -= TOKENS
            filled += CHUNK
            cache["global_end_index"].fill_(end)
            cache["local_end_index"].fill_(filled)
        rows = slice(filled - CHUNK, filled)
        cache["k"][:, rows], cache["v"][:, rows], self.numbers[rows] = k, v, torch.arange(start, end)
        return filled


class OwnFirst(Numbered):
    """The chunk's own keys are read before the others."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        order = torch.arange(len(numbers)).roll(CHUNK)
        return super().read(q, k[:, order], v[:, order], numbers[order])


class WrittenLate(Numbered):
    """A chunk comes into the cache as the next one begins; until then its rows are beside it."""

    held: tuple[Tensor, Tensor, int] | None = None

    def forward(self, x: Tensor, kv_cache: Cache, current_start: int) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        if self.held is not None and self.held[2] < current_start:
            self.write(self.held[0], self.held[1], kv_cache, self.held[2])
        self.held = (k, v, current_start)
        filled = int(kv_cache["local_end_index"])
        keys, values = (torch.cat([kv_cache[name][:, :filled], own], 1) for name, own in (("k", k), ("v", v)))
        numbers = torch.cat([self.numbers[:filled], torch.arange(current_start, current_start + CHUNK)])
        return x + self.o(self.read(q, keys, values, numbers).flatten(2))


class FirstTwice(Numbered):
    """The first frame is read a second time, behind all others."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        k, v = (torch.cat([x, x[:, :TOKENS]], dim=1) for x in (k, v))
        return super().read(q, k, v, torch.cat([numbers, numbers[:TOKENS]]))


class Halved(Numbered):
    """V is kept twice as large as it is read."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        return super().write(k, 2 * v, cache, start)

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        return super().read(q, k, v / 2, numbers)


EXACT = (TurnedByPlace, Shrinks, Thins, OwnFirst, WrittenLate)
REFUSED = {FirstTwice: NO_ROWS, Halved: NO_ROWS, NewestFirst: "wrote over some of|rows that are hidden from a call"}


@pytest.mark.parametrize("at", (2, 4, 5))
@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.__name__)
def test_pruned_equals_minus_infinity(kind: type[SelfAttention], at: int, home: types.ModuleType) -> None:
    fork, expected = numbered(kind), reference(kind, home, at)
    with tokentrim.patched(fork, ForcedPolicy({at: DEAD})):
        ours = rollout(fork, cache_of())
    assert float((ours - rollout(numbered(kind), cache_of())).abs().max()) > 1e-4
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", (2, 3))
@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.__name__)
def test_hidden_equals_minus_infinity(kind: type[SelfAttention], frames: int, home: types.ModuleType) -> None:
    fork, expected = numbered(kind), hidden_by_hand(kind, home, frames)
    with tokentrim.patched(fork, CommitWindow(frames)):
        ours = rollout(fork, cache_of())
    assert float((ours - rollout(numbered(kind), cache_of())).abs().max()) > 1e-4
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", (ForcedPolicy({4: DEAD}), CommitWindow(3)), ids=("prunes", "hides"))
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused(kind: type[SelfAttention], policy: tokentrim.Policy) -> None:
    fork = numbered(kind)
    with tokentrim.patched(fork, policy), pytest.raises(UnsupportedContextError, match=REFUSED[kind]):
        rollout(fork, cache_of())
