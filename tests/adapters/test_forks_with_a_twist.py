"""Further forks that nobody has published, as in ``test_invented_forks.py``: each keeps its rows in a way of its own.

In another type or shape, beside others, joined with K, with rows that are no tokens, or read in a way that hides what
was marked. Exact, or refused in words.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from test_invented_forks import (
    CHUNK,
    Numbered,
    numbered,
    reference,
    rollout,
)
from test_memory_made_of_rows import CHUNKS, WINDOW, home
from test_unknown_forks import DEAD, HEADS, TOKENS, WIDTH, SelfAttention, cache_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import LatentsError, TokenTrimError, TokenTrimWarning
from tokentrim_hooks.testing import ForcedPolicy

assert home  # the fixture that gives the fork's attention a namespace
DIM = WIDTH // HEADS
Cache = dict[str, Any]


class OneTensor(Numbered):
    """K and V are views of one tensor ``[B, rows, heads, 2, head_dim]``."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        if cache["k"].untyped_storage().data_ptr() != cache["v"].untyped_storage().data_ptr():
            cache["k"], cache["v"] = torch.stack([cache["k"], cache["v"]], dim=3).unbind(3)
        return super().write(k, v, cache, start)


class ValuesThenKeys(Numbered):
    """``v`` holds V and K of a row side by side."""

    def joined(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([v, k], -1)

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        if cache["v"].shape[-1] == DIM:
            cache["v"] = torch.cat([cache["v"], cache["v"]], -1)
        return super().write(k, self.joined(k, v), cache, start)

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        v, k = v.chunk(2, -1)
        return super().read(q, k, v, numbers)


class KeysThenValues(ValuesThenKeys):
    """The other way round: a mark would lie in K."""

    def joined(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([k, v], -1)

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        return super().read(q, k, v.roll(DIM, -1), numbers)


class Growing(Numbered):
    """The cache is as long as it must be, and joined anew in every call."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        end = start + k.shape[1]
        for name, part in zip("kv", (k, v), strict=True):
            cache[name] = torch.cat([cache[name][:, :start], part], 1)
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(end)
        self.numbers = torch.arange(end)
        return end


class OneQueryMore(Numbered):
    """A register asks as well."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        return super().read(torch.cat([q, q[:, :1]], 1), k, v, numbers)[:, :-1]


class PaddedWithZeros(Numbered):
    """To a multiple of 16 keys."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        pad = torch.zeros(1, -len(numbers) % 16, HEADS, DIM)
        numbers = torch.cat([numbers, torch.full((pad.shape[1],), -1)])
        return super().read(q, torch.cat([k, pad], 1), torch.cat([v, pad], 1), numbers)


class ReadsTheWholeCache(Numbered):
    """Rows behind the last one as well."""

    def forward(self, x: Tensor, kv_cache: Cache, current_start: int) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        self.write(k, v, kv_cache, current_start)
        numbers = self.numbers[: kv_cache["k"].shape[1]]
        return x + self.o(self.read(q, kv_cache["k"], kv_cache["v"], numbers).flatten(2))


class RegisterForToken(Numbered):
    """The last row of a frame is a register, not its token."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        last = (torch.arange(k.shape[1]) % TOKENS == TOKENS - 1)[:, None, None]
        return super().write(k.masked_fill(last, 0.3), v.masked_fill(last, 0.5), cache, start)


class MergedAsWritten(Numbered):
    """A chunk's frames have one and the same row for a token."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        k, v = (x.unflatten(1, (-1, TOKENS)).mean(1).repeat(1, x.shape[1] // TOKENS, 1, 1) for x in (k, v))
        return super().write(k, v, cache, start)


class SinksElsewhere(Numbered):
    """The first chunk is kept in tensors of its own, and was never in the cache."""

    def forward(self, x: Tensor, kv_cache: Cache, current_start: int) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        if current_start == 0:
            self.sink = k, v
            kv_cache["global_end_index"].fill_(CHUNK)
            return x + self.o(self.read(q, k, v, torch.arange(CHUNK)).flatten(2))
        filled = self.write(k, v, kv_cache, current_start)
        k, v = (torch.cat([sink, kv_cache[name][:, :filled]], 1) for name, sink in zip("kv", self.sink, strict=True))
        return x + self.o(self.read(q, k, v, torch.cat([torch.arange(CHUNK), self.numbers[:filled]])).flatten(2))


class ScaledAsStored(Numbered):
    """V is stored with a scale."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        return super().write(k, v / 3, cache, start)

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        return super().read(q, k, v * 3, numbers)


class ZeroedInAHead(Numbered):
    """One head looks back less far: what it does not see is 0 there."""

    head = 1

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        v = v.clone()
        v[:, : max(len(numbers) - 2 * CHUNK, 0), self.head] = 0
        return super().read(q, k, v, numbers)


class ZeroedInTheFirstHead(ZeroedInAHead):
    """In that which is marked."""

    head = 0


class RotatedInPlace(Numbered):
    """V of old rows is turned in the cache, chunk by chunk."""

    def turned(self, old: Tensor) -> Tensor:
        x, y = old.chunk(2, -1)
        return torch.cat([0.8 * x - 0.6 * y, 0.6 * x + 0.8 * y], -1)

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        before = int(cache["global_end_index"])
        filled = super().write(k, v, cache, start)
        if start + k.shape[1] > before:
            cache["v"][:, : filled - CHUNK] = self.turned(cache["v"][:, : filled - CHUNK])
        return filled


class SmoothedInPlace(RotatedInPlace):
    """They take in a share of their neighbours."""

    def turned(self, old: Tensor) -> Tensor:
        return 0.9 * old + 0.1 * old.roll(1, 1)


class HeadsFirst(Numbered):
    """Stored as ``[B, heads, rows, head_dim]``."""

    def forward(self, x: Tensor, kv_cache: Cache, current_start: int) -> Tensor:
        for name in "kv" if kv_cache["v"].shape[1] != HEADS else "":
            kv_cache[name] = kv_cache[name].transpose(1, 2).contiguous()
        turned = {**kv_cache, **{name: kv_cache[name].transpose(1, 2) for name in "kv"}}
        return super().forward(x, turned, current_start)


class RegisterBehindEachFrame(Numbered):
    """Cached and counted."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        def longer(rows: Tensor) -> Tensor:
            frames = rows.unflatten(1, (-1, TOKENS))
            return torch.cat([frames, torch.ones_like(frames[:, :, :1])], 2).flatten(1, 2)

        return super().write(longer(k), longer(v), cache, start // TOKENS * (TOKENS + 1))


class KeptInRing(Numbered):
    """Rows are written over where they lie."""

    def write(self, k: Tensor, v: Tensor, cache: Cache, start: int) -> int:
        end, place = start + k.shape[1], start % WINDOW
        cache["k"][:, place : place + CHUNK], cache["v"][:, place : place + CHUNK] = k, v
        self.numbers[place : place + CHUNK] = torch.arange(start, end)
        cache["global_end_index"].fill_(end)
        cache["local_end_index"].fill_(min(end, WINDOW))
        return min(end, WINDOW)


class Clamped(Numbered):
    """V is held in bounds as it is read, and a mark with it."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        return super().read(q, k, v.clamp(-10, 10), numbers)


EXACT = (OneTensor, ValuesThenKeys, Growing, OneQueryMore, PaddedWithZeros, ReadsTheWholeCache, RegisterForToken,
         MergedAsWritten)  # fmt: skip
NO_ROWS, OVERWRITTEN = "are no rows of the KV cache", "the next call wrote over some"
REFUSED = {
    SinksElsewhere: NO_ROWS,
    ScaledAsStored: NO_ROWS,
    ZeroedInAHead: NO_ROWS,
    ZeroedInTheFirstHead: OVERWRITTEN,
    RotatedInPlace: NO_ROWS,
    SmoothedInPlace: NO_ROWS,
    HeadsFirst: "for values of 2 rows",
    RegisterBehindEachFrame: "another order than its tokens",
    KeptInRing: OVERWRITTEN,
}


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.__name__)
def test_exact(kind: type[SelfAttention], home: types.ModuleType) -> None:
    fork, expected = numbered(kind), reference(kind, home, 4)
    with tokentrim.patched(fork, ForcedPolicy({4: DEAD})):
        ours = rollout(fork, cache_of())
    assert float((ours - rollout(numbered(kind), cache_of())).abs().max()) > 1e-4
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused(kind: type[SelfAttention]) -> None:
    fork = numbered(kind)
    with tokentrim.patched(fork, ForcedPolicy({4: DEAD})), pytest.raises(TokenTrimError, match=REFUSED[kind]):
        rollout(fork, cache_of())


@pytest.mark.parametrize("kind", (Clamped, KeysThenValues), ids=lambda kind: kind.__name__)
def test_where_no_mark_reaches_attention_nothing_is_pruned_and_that_is_said(kind: type[SelfAttention]) -> None:
    fork, cache, plain = numbered(kind), cache_of(), rollout(numbered(kind), cache_of())
    with pytest.warns(TokenTrimWarning, match="0 dead keys dropped"), tokentrim.patched(fork, ForcedPolicy({4: DEAD})):
        ours = rollout(fork, cache)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("turn", ("chunks", "steps"))
def test_two_denoisers_that_share_a_cache_in_turns(turn: str) -> None:
    """One is patched: the other reads its marks, by which its chunks become NaN, and that is said."""
    torch.manual_seed(1)
    both, cache = (numbered(Numbered), numbered(Numbered)), cache_of()
    for one, other in zip(*(net.model.blocks for net in both), strict=True):
        other.self_attn.numbers = one.self_attn.numbers
    pruned = ForcedPolicy({2: DEAD})
    with tokentrim.patched(both[0], pruned), pytest.raises(LatentsError, match="another one reads pruned rows"):
        for chunk in range(CHUNKS):
            x0 = torch.randn(1, 2, 4, 4, 4)
            for step, level in enumerate((1000, 500, 0)):
                net = both[(chunk if turn == "chunks" else step) % 2]
                _, answer = net(x0 + 0.1 * bool(level), {}, torch.full((1, 2), level), cache, None, chunk * CHUNK)
                x0 = answer if level else x0
