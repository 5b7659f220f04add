"""A model that keeps other memory, made of rows of its cache: refused unless its adapter keeps that memory right.

Running means of what has left the window (MemRoPE's EMA tokens), copies in a bank beside the cache, a sink that rows
are blended into. What was pruned lives on there, or its mark spreads; both would be wrong in silence. What is made of
rows unchanged (a sink that is copied from a later frame) is exact, and is not refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_unknown_forks import DEAD, HOME, TOKENS, Fork, SelfAttention, cache_of, home
from tokentrim_hooks_adapters.self_forcing import SelfForcing
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.pruning.account import KeyAccount
from tokentrim_hooks.pruning.account_of_hidden import AccountsOfHidden
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.pruning.tombstones import alive_rows
from tokentrim_hooks.testing import ForcedPolicy, count_syncs

assert home  # the fixture that gives the fork's attention a namespace

WINDOW = 3 * 2 * TOKENS
"""Rows that a layer attends to at most, its chunk's own among them; the cache has room for more."""
POLICY = ForcedPolicy({2: DEAD})
CHUNKS = 7


class Rolling(SelfAttention):
    """Attention over a window that rolls: ``leaving(rows)`` is told what has left, ``beside(k, v)`` adds keys."""

    def forward(self, x: Tensor, kv_cache: dict[str, Any], current_start: int) -> Tensor:
        q, k, v = (part.unflatten(2, (2, -1)) for part in self.qkv(x).chunk(3, -1))
        new, end = x.shape[1], current_start + x.shape[1]
        filled = int(kv_cache["local_end_index"])
        if end > int(kv_cache["global_end_index"]):
            evicted = max(filled + new - WINDOW, 0)
            if evicted:
                self.leaving({name: kv_cache[name][:, :evicted].clone() for name in "kv"}, kv_cache)
                for name in "kv":
                    kept = kv_cache[name][:, evicted:filled].clone()
                    kv_cache[name][:, : filled - evicted] = kept
            filled = filled - evicted + new
            kv_cache["global_end_index"].fill_(end)
            kv_cache["local_end_index"].fill_(filled)
        kv_cache["k"][:, filled - new : filled], kv_cache["v"][:, filled - new : filled] = k, v
        keys, values = self.seen(kv_cache["k"][:, :filled], kv_cache["v"][:, :filled])
        return x + self.o(self.attend(q, keys, values).flatten(2))

    def leaving(self, rows: dict[str, Tensor], kv_cache: dict[str, Any]) -> None:
        """What becomes of rows that leave the window."""

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What attention sees."""
        return k, v


class Beside(Rolling):
    """Attention sees a memory beside the cache; ``keep(rows)`` makes it of what leaves the window."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, Tensor] = {}

    def leaving(self, rows: dict[str, Tensor], kv_cache: dict[str, Any]) -> None:
        self.memory = {name: self.keep(self.memory.get(name), part) for name, part in rows.items()}

    def keep(self, memory: Tensor | None, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.memory:
            return k, v
        return torch.cat([self.memory["k"], k], dim=1), torch.cat([self.memory["v"], v], dim=1)


class RunningMeans(Beside):
    """MemRoPE's kind: one frame of means, token by token."""

    def keep(self, memory: Tensor | None, rows: Tensor) -> Tensor:
        mean = rows.unflatten(1, (-1, TOKENS)).mean(1)
        return mean if memory is None else 0.9 * memory + 0.1 * mean


class OneMean(Beside):
    """One mean of all rows, so that one mark kills all of the memory."""

    def keep(self, memory: Tensor | None, rows: Tensor) -> Tensor:
        mean = rows.mean(1, keepdim=True).expand(-1, TOKENS, -1, -1)
        return mean if memory is None else 0.9 * memory + 0.1 * mean


class CleanMeans(RunningMeans):
    """Means that leave out what is not finite: no mark spreads, and nobody would notice by marks."""

    def keep(self, memory: Tensor | None, rows: Tensor) -> Tensor:
        return super().keep(memory, torch.nan_to_num(rows, posinf=0.0, neginf=0.0))


class Bank(Beside):
    """Copies of what has left."""

    def keep(self, memory: Tensor | None, rows: Tensor) -> Tensor:
        return rows[:, :TOKENS] if memory is None else torch.cat([memory, rows[:, :TOKENS]], dim=1)


class BankOfTheNewest(Rolling):
    """Copies of rows that are still in the window, made before anything is pruned: contents that are known."""

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "bank"):
            self.bank = k[:, :TOKENS].clone(), v[:, :TOKENS].clone()
        return torch.cat([self.bank[0], k], dim=1), torch.cat([self.bank[1], v], dim=1)


class Registers(Rolling):
    """Keys that were never rows: they may be harmless, which only an adapter can say."""

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        more = torch.linspace(-1, 1, k[:, :2].numel()).view_as(k[:, :2])
        return torch.cat([more, k], dim=1), torch.cat([more.flip(1), v], dim=1)


class BlendedSink(Rolling):
    """The first frame of the window takes in a share of every row that leaves."""

    sink = 0.5

    def leaving(self, rows: dict[str, Tensor], kv_cache: dict[str, Any]) -> None:
        for name, part in rows.items():
            place = kv_cache[name][:, 2 * TOKENS : 3 * TOKENS]  # where the oldest frame that stays is
            place.copy_((1 - self.sink) * place + self.sink * part.unflatten(1, (-1, TOKENS)).mean(1))


class SinkWithoutMarks(BlendedSink):
    """The same, and no mark gets in: what dies is only what was pruned, but the sink keeps a share of it."""

    def leaving(self, rows: dict[str, Tensor], kv_cache: dict[str, Any]) -> None:
        super().leaving({name: torch.nan_to_num(part, posinf=0.0) for name, part in rows.items()}, kv_cache)


class CopiedSink(Rolling):
    """The oldest frame that stays is written over by a copy of another one: a row becomes another row."""

    def leaving(self, rows: dict[str, Tensor], kv_cache: dict[str, Any]) -> None:
        for name in rows:
            kv_cache[name][:, 2 * TOKENS : 3 * TOKENS] = kv_cache[name][:, 3 * TOKENS : 4 * TOKENS].clone()


class WrittenLate(BlendedSink):
    """Attention over a copy of the cache, put into it when attention is done: also what was made of marked rows."""

    def forward(self, x: Tensor, kv_cache: dict[str, Any], current_start: int) -> Tensor:
        copy = {name: tensor.clone() for name, tensor in kv_cache.items()}
        out = super().forward(x, copy, current_start)
        self.write(kv_cache, copy)
        return out

    def write(self, kv_cache: dict[str, Any], copy: dict[str, Any]) -> None:
        """Into the cache's own memory."""
        for name, tensor in copy.items():
            kv_cache[name].copy_(tensor)


class MadeAnew(WrittenLate):
    """The copy becomes the cache."""

    def write(self, kv_cache: dict[str, Any], copy: dict[str, Any]) -> None:
        kv_cache.update(copy)


class Ring(Rolling):
    """Rows never move: a full buffer is written over where it is oldest, under counters that say nothing of it."""

    def forward(self, x: Tensor, kv_cache: dict[str, Any], current_start: int) -> Tensor:
        q, k, v = (part.unflatten(2, (2, -1)) for part in self.qkv(x).chunk(3, -1))
        new, at = x.shape[1], current_start % WINDOW
        kv_cache["k"][:, at : at + new], kv_cache["v"][:, at : at + new] = k, v
        kv_cache["global_end_index"].fill_(current_start + new)
        filled = min(current_start + new, WINDOW)
        kv_cache["local_end_index"].fill_(filled)
        return x + self.o(self.attend(q, kv_cache["k"][:, :filled], kv_cache["v"][:, :filled]).flatten(2))


MADE_OF_ROWS = (RunningMeans, OneMean, CleanMeans, Registers, BlendedSink, SinkWithoutMarks)
each_memory = pytest.mark.parametrize("kind", (*MADE_OF_ROWS, BankOfTheNewest), ids=lambda kind: kind.__name__)
each_exact = pytest.mark.parametrize("kind", (Rolling, CopiedSink, Bank), ids=lambda kind: kind.__name__)
WORDS = r"keys in self attention are no rows of the KV cache.*(.|\n)*keeps_memory = True"


def fork_of(kind: type[SelfAttention]) -> Fork:
    here = type(kind.__name__, (kind,), {"__module__": HOME})
    return type("KindOfFork", (Fork,), {"attention": here})()


def rollout(generator: Fork, cache: Any, prune: Callable[[int], bool] = lambda chunk: False) -> Tensor:
    """Seven chunks of two frames. Where ``prune(chunk)`` marked something, a chunk's first call is made again."""
    torch.manual_seed(1)
    chunks = []
    for chunk in range(CHUNKS):
        x0 = torch.randn(1, 2, 4, 4, 4)
        for step in (1000, 500):
            call = x0 + 0.1, {}, torch.full((1, 2), step), cache, None, 2 * chunk * TOKENS
            _, x0 = generator(*call)
            if step == 1000 and prune(chunk):
                _, x0 = generator(*call)
        generator(x0, {}, torch.zeros(1, 2), cache, None, 2 * chunk * TOKENS)
        chunks.append(x0)
    return torch.cat(chunks, dim=1)


def pruned(kind: type[SelfAttention], policy: Any = POLICY, **options: Any) -> Tensor:
    fork = fork_of(kind)
    with tokentrim.patched(fork, policy, **options):
        return rollout(fork, cache_of())


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-inf at the keys whose V is marked, written out."""
    dead = v[..., 0, 0].isinf()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(dead[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.masked_fill(dead[..., None, None], 0.0))


def reference(kind: type[SelfAttention], home: Any, at: int = 2) -> Tensor:
    """The same with -inf at dead keys, and nothing of tokentrim."""
    fork, cache = fork_of(kind), cache_of()

    def prune(chunk: int) -> bool:
        for layer in cache if chunk == at else ():
            stop = int(layer["local_end_index"]) - 2 * TOKENS
            for row in range(stop):
                layer["v"][:, row, 0, 0] = float("inf") if row % TOKENS in DEAD else layer["v"][:, row, 0, 0]
        return chunk == at

    home.attention = masked_attention
    return rollout(fork, cache, prune)


@each_memory
def test_other_memory_is_refused(kind: type[SelfAttention]) -> None:
    """At the prune, or where such a memory first appears while something is dead."""
    with pytest.raises(UnsupportedContextError, match=WORDS):
        pruned(kind)


@each_memory
def test_so_is_memory_that_was_there_before_the_prune(kind: type[SelfAttention]) -> None:
    """The memory has taken in what is pruned now: a chunk late in the video, when the window has long begun to roll."""
    with pytest.raises(UnsupportedContextError, match=WORDS):
        pruned(kind, ForcedPolicy({5: DEAD}))


@pytest.mark.parametrize("at", (3, 4, 5, 6))
def test_a_ring_buffer_is_refused_wherever_the_chunk_stands_in_it(at: int) -> None:
    """But not where the chunk is the last of it, which is where the adapter says."""
    policy = ForcedPolicy({at: DEAD})
    if at % 3 == 2:
        pruned(Ring, policy)
        return
    with pytest.raises(UnsupportedContextError, match=r"(?s)the chunk's own are not the last.*ring buffer"):
        pruned(Ring, policy)


def test_a_bank_of_living_copies_is_refused() -> None:
    with pytest.raises(UnsupportedContextError, match=r"(4|8|12) of \d+ keys"):
        pruned(Bank, ForcedPolicy({5: DEAD}))


@pytest.mark.parametrize("kind", (*MADE_OF_ROWS, WrittenLate, MadeAnew), ids=lambda kind: kind.__name__)
def test_with_warn_the_video_goes_on_and_no_mark_is_left(kind: type[SelfAttention]) -> None:
    fork, cache = fork_of(kind), cache_of()
    with (
        pytest.warns(tokentrim.TokenTrimWarning, match="no rows of the KV cache"),
        tokentrim.patched(fork, POLICY, on_error="warn") as handle,
    ):
        video = rollout(fork, cache)
    assert torch.isfinite(video).all() and not handle.active
    assert all(bool(alive_rows(layer["v"]).all()) for layer in cache)


@each_exact
def test_rows_that_move_or_are_copied_are_exact(kind: type[SelfAttention], home: Any) -> None:
    """Rolled, copied over another row, or copied into a bank after the prune: the mark goes with them."""
    ours = pruned(kind)
    assert float((ours - rollout(fork_of(kind), cache_of())).abs().max()) > 1e-4
    assert torch.allclose(ours, reference(kind, home), atol=1e-5, rtol=0)


def test_an_adapter_that_keeps_the_memory_right_says_so(home: Any) -> None:
    class WithBank(SelfForcing):
        keeps_memory = True

    fork = fork_of(Bank)
    with tokentrim.patched(fork, ForcedPolicy({5: DEAD}), adapter=WithBank) as handle:
        ours = rollout(fork, cache_of())
    assert [record.chunk for record in handle.report if record.pruned] == [5]
    assert torch.allclose(ours, reference(Bank, home, at=5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_what_is_rounded_on_its_way_is_no_other_memory(dtype: torch.dtype) -> None:
    """The cache rounds what attention saw unrounded, in the call that wrote it; then that is read back."""

    class Unrounded(Rolling):
        def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return k.float(), v.float()

    fork = fork_of(Unrounded)
    with tokentrim.patched(fork, ForcedPolicy({2: DEAD, 4: DEAD})) as handle:
        rollout(fork, cache_of(dtype))
    assert [record.chunk for record in handle.report if record.pruned] == [2, 4]


class Scaled(Rolling):
    """Rows are kept in float8, twice as small as attention sees them; other memory is made of the latter."""

    def leaving(self, rows: dict[str, Tensor], kv_cache: dict[str, Any]) -> None:
        super().leaving({name: 2 * part.float() for name, part in rows.items()}, kv_cache)

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().seen(2 * k.float(), 2 * v.float())


EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", EIGHTS, ids=str)
def test_rows_of_float8_are_known_by_their_signs(dtype: torch.dtype) -> None:
    fork = fork_of(Scaled)
    with tokentrim.patched(fork, ForcedPolicy({2: DEAD, 4: DEAD})) as handle:
        rollout(fork, cache_of(dtype))
    assert [record.chunk for record in handle.report if record.pruned] == [2, 4]


@pytest.mark.parametrize("dtype", EIGHTS, ids=str)
def test_other_memory_beside_float8_is_refused(dtype: torch.dtype) -> None:
    fork = fork_of(type("ScaledRegisters", (Scaled, Registers), {}))
    with pytest.raises(UnsupportedContextError, match=WORDS), tokentrim.patched(fork, POLICY):
        rollout(fork, cache_of(dtype))


@pytest.mark.parametrize("dtype", EIGHTS, ids=str)
def test_a_mean_of_rows_of_float8_has_other_signs(dtype: torch.dtype) -> None:
    """With heads as wide as models have them: rows are known at any scale and before they are rounded."""
    torch.manual_seed(0)
    unrounded = torch.randn(1, 12, 2, 64)
    rows = unrounded.to(dtype)
    account = KeyAccount(CacheRows([rows], 0, 12, 4))
    for same in (rows.float(), 0.3 * rows.bfloat16(), unrounded):
        assert account.known(same, new=1).all()
    assert account.known(rows, new=1).all(), "attention may read float8 itself"
    mean = rows.float().unflatten(1, (-1, 4)).mean(1)
    for new, other in ((2, mean), (3, 0.7 * rows.float()[:, :4] + 0.3 * rows.float()[:, 4:8]), (4, -rows.float())):
        assert not account.known(other, new).any()


@pytest.mark.parametrize("dtype", (torch.float32, *EIGHTS), ids=str)
def test_padding_is_no_memory(dtype: torch.dtype) -> None:
    """As flex attention pads keys: with zeros, behind the others."""
    torch.manual_seed(0)
    rows = torch.randn(1, 8, 2, 8).to(dtype)
    account, alive = KeyAccount(CacheRows([rows], 0, 8, 4)), torch.arange(16)[None] > 0
    seen = torch.cat([rows.float(), torch.zeros(1, 8, 2, 8)], dim=1)
    known = account.known(seen, new=4)
    assert known.all()
    account.require(alive, known, new=4, padded=True)
    other = torch.cat([rows.float(), torch.randn(1, 8, 2, 8)], dim=1)
    with pytest.raises(UnsupportedContextError, match="4 of 16 keys"):
        account.require(alive, account.known(other, new=4), new=4, padded=True)


def test_accounting_costs_no_synchronisation() -> None:
    """One read in a call, as many as without it."""

    class Trusting(SelfForcing):
        keeps_memory = True

    def waits(adapter: Any) -> int:
        fork = fork_of(Rolling)
        with tokentrim.patched(fork, POLICY, adapter=adapter), count_syncs() as log:
            rollout(fork, cache_of())
        return sum(event.ours and "pruning/" in event.place for event in log.events)

    assert waits(SelfForcing) == waits(Trusting) > 0


def test_within_a_chunk_keys_are_looked_for_where_they_lay_and_then_everywhere() -> None:
    """No sort where all but the chunk's own keys lie as in its call before; where they do not, what is known stays so.

    And what is not known is refused as in a chunk's first call.
    """
    torch.manual_seed(0)
    rows, alive = torch.randn(1, 8, 2, 8), torch.arange(10)[None] > 0
    account = KeyAccount(CacheRows([rows], 0, 8, 4))

    def call(start: int, values: torch.Tensor) -> int:
        account.begin(start)
        with torch.profiler.profile() as profile:
            known = account.known(values, new=2)
            account.require(alive, known, new=2)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::sort")

    def keys(*parts: torch.Tensor) -> torch.Tensor:
        return torch.cat([*parts, torch.randn(1, 2, 2, 8)], dim=1)

    assert call(3, keys(rows)) == 1
    assert call(3, keys(rows)) == 0, "looked for everywhere, though nothing has moved"
    assert call(3, keys(rows.roll(4, 1))) == 1
    assert call(6, keys(rows)) == 1, "another chunk, whose rows may have moved"
    with pytest.raises(UnsupportedContextError, match="4 of 10 keys"):
        call(6, keys(rows[:, :4], rows[:, :4] / 2 + rows[:, 4:] / 2))


def test_of_hidden_rows_keys_are_looked_for_in_place_and_sorted_where_they_lie_elsewhere() -> None:
    """Each chunk and kind of call was sorted: SoftPrune cost 2 % more by it. Memory is refused as ever."""
    torch.manual_seed(0)
    rows, own, hidden = torch.randn(1, 12, 2, 8), torch.randn(1, 2, 2, 8), torch.arange(12)[None] > 0
    accounts = AccountsOfHidden(keeps_memory=False)

    def call(start: int, values: torch.Tensor) -> int:
        account = accounts.account(CacheRows([rows], 0, 10, 2), "a", "refine", start)
        assert account is not None
        with torch.profiler.profile() as profile:
            known = account.known(values, new=2)
            account.require(hidden[:, : values.shape[1]], known, new=2)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::sort")

    def rolled(*parts: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[:, :4], *parts, own], dim=1)

    assert call(0, torch.cat([rows[:, :10], own], dim=1)) == 0
    assert call(2, rolled(rows[:, 6:])) == 0, "behind a sink, rows that were moved by as many as came"
    assert call(4, torch.cat([rows[:, 4:], own], dim=1)) == 1, "moved by others"
    assert call(6, torch.cat([rows[:, 4:], own], dim=1)) == 1
    accounts.forget()
    with pytest.raises(UnsupportedContextError, match="2 of 12 keys"):
        call(8, rolled(rows[:, 6:10], rows[:, 10:] / 2))
