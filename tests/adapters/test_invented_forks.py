"""Forks that nobody has published, each with one thing of its own: exact, or refused in words, never silently wrong.

The reference knows each key by a number that the fork keeps beside its rows: frame and token. At the softmax the dead
ones get -inf. It looks at no mark, and nothing of tokentrim runs in it: rows that move or merge are seen as they are.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from test_memory_made_of_rows import CHUNKS, WINDOW, fork_of, home
from test_unknown_forks import DEAD, HEADS, TOKENS, WIDTH, Fork, SelfAttention, cache_of, plain_attention
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import UnsupportedContextError
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.commit_window import CommitWindow
from tokentrim_hooks.testing import ForcedPolicy

assert home  # the fixture that gives the fork's attention a namespace
CHUNK, TILES = 2 * TOKENS, [3, 1, 0, 2]


class Numbered(SelfAttention):
    """A window that rolls, with the number of each row beside it; ``read`` says which keys attention is given."""

    layers = 0
    now: ClassVar[Tensor]
    """Numbers of the keys of the attention call that comes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.numbers = Numbered.layers % 2, torch.full((16 * TOKENS,), -1)
        Numbered.layers += 1

    def window(self) -> int:
        return WINDOW

    def forward(self, x: Tensor, kv_cache: dict[str, Any], current_start: int) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        filled = self.write(k, v, kv_cache, current_start)
        keys, values = kv_cache["k"][:, :filled], kv_cache["v"][:, :filled]
        return x + self.o(self.read(q, keys, values, self.numbers[:filled]).flatten(2))

    def write(self, k: Tensor, v: Tensor, cache: dict[str, Any], start: int) -> int:
        new, end, filled = k.shape[1], start + k.shape[1], int(cache["local_end_index"])
        if end > (before := int(cache["global_end_index"])):
            fresh = end - max(before, start)
            gone = max(filled + fresh - self.window(), 0)
            for rows in (cache["k"][0], cache["v"][0], self.numbers):
                rows[: filled - gone] = rows[gone:filled].clone()
            filled += fresh - gone
            cache["global_end_index"].fill_(end)
            cache["local_end_index"].fill_(filled)
        cache["k"][:, filled - new : filled], cache["v"][:, filled - new : filled] = k, v
        self.numbers[filled - new : filled] = torch.arange(start, end)
        return filled

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        Numbered.now = numbers
        return self.attend(q, k, v)


class ReadsLess(Numbered):
    """The second layer reads the latest rows only."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        first = max(len(numbers) - 2 * CHUNK, 0) if self.layer else 0
        return super().read(q, k[:, first:], v[:, first:], numbers[first:])


class ReadsWithoutAFrame(Numbered):
    """The second layer skips a frame in the middle."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        place = torch.arange(len(numbers))
        some = place[(place < TOKENS) | (place >= 2 * TOKENS)] if self.layer else place
        return super().read(q, k[:, some], v[:, some], numbers[some])


class KeepsLess(Numbered):
    """The second layer has the smaller window, so that its rows are elsewhere."""

    def window(self) -> int:
        return 2 * CHUNK if self.layer else WINDOW


class MergesKeys(Numbered):
    """K of old frames is their mean, V is not: a dead token's key is in others', which the softmax never asks."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        if len(numbers) > 2 * CHUNK:
            mean = k[:, :CHUNK].unflatten(1, (2, TOKENS)).mean(1)
            k = torch.cat([mean, mean, k[:, CHUNK:]], dim=1)
        return super().read(q, k, v, numbers)


class TwoKernels(Numbered):
    """History and the chunk's own rows are attended apart."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        old = len(numbers) - q.shape[1]
        if not old:
            return super().read(q, k, v, numbers)
        parts = [(k[:, some], v[:, some], numbers[some]) for some in (slice(old), slice(old, None))]
        first, second = (super(TwoKernels, self).read(q, *part) for part in parts)
        return (first + second) / 2


class FramesBackwards(Numbered):
    """A chunk's frames lie newest first."""

    def order(self) -> Tensor:
        return torch.arange(CHUNK).view(-1, TOKENS).flip(0).flatten()

    def write(self, k: Tensor, v: Tensor, cache: dict[str, Any], start: int) -> int:
        order = self.order()
        filled = super().write(k[:, order], v[:, order], cache, start)
        self.numbers[filled - CHUNK : filled] = start + order
        return filled


class MadeAnew(Numbered):
    """The cache's tensors are made anew in every call."""

    def write(self, k: Tensor, v: Tensor, cache: dict[str, Any], start: int) -> int:
        cache.update({name: cache[name].clone() for name in "kv"})
        return super().write(k, v, cache, start)


class KeepsMore(Numbered):
    """The second layer has the larger window, of which the first one's counters say nothing."""

    def window(self) -> int:
        return WINDOW if self.layer else 2 * CHUNK


class HeadsApart(Numbered):
    """In the second layer one head looks back further than the other, by kernels of their own."""

    back = CHUNK + CHUNK

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        if not self.layer:
            return super().read(q, k, v, numbers)
        first = max(len(numbers) - self.back, 0)
        far = super().read(q[:, :, :1], k[:, :, :1], v[:, :, :1], numbers)
        near = super().read(q[:, :, 1:], k[:, first:, 1:], v[:, first:, 1:], numbers[first:])
        return torch.cat([far, near], dim=2)


class HeadsApartAlike(HeadsApart):
    """They look back equally far."""

    back = 100 * CHUNK


class HeadsApartInAll(HeadsApart):
    """In all layers."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        self.layer = 1
        return super().read(q, k, v, numbers)


class TextAmongRows(Numbered):
    """A few rows of text are at the front of the cache, and are counted."""

    text = 3

    def window(self) -> int:
        return 100 * CHUNK

    def write(self, k: Tensor, v: Tensor, cache: dict[str, Any], start: int) -> int:
        if not int(cache["local_end_index"]):
            rows = torch.linspace(-1, 1, self.text * WIDTH).view(1, self.text, HEADS, -1)
            cache.update({name: torch.cat([rows, cache[name], cache[name]], dim=1) for name in "kv"})
            cache["local_end_index"].fill_(self.text)
        return super().write(k, v, cache, start)


class FrameOfText(TextAmongRows):
    """As many as a frame has."""

    text = TOKENS


class Merged(Numbered):
    """Old frames are merged two to one as they are read."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        if len(numbers) > 2 * CHUNK:
            k, v = (torch.cat([x[:, :CHUNK].unflatten(1, (2, -1)).mean(1), x[:, CHUNK:]], dim=1) for x in (k, v))
            numbers = numbers[TOKENS:]
        return super().read(q, k, v, numbers)


class ReadsEverySecond(Numbered):
    """Of old frames every second token is read."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        place = torch.arange(len(numbers))
        some = torch.cat([place[:-CHUNK:2], place[-CHUNK:]])
        return super().read(q, k[:, some], v[:, some], numbers[some])


class Gated(Numbered):
    """V is scaled by its age as it is read."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        return super().read(q, k, v * torch.linspace(0.5, 1, v.shape[1])[:, None, None], numbers)


class Latent(Numbered):
    """V is made of what is in the cache by a product, as latent attention does."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        return super().read(q, k, v @ torch.randn(v.shape[-1], v.shape[-1], generator=torch.manual_seed(5)), numbers)


class FramesApart(Numbered):
    """The queries of each frame have keys of their own, equally many."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        answers = []
        for stop, queries in zip((len(numbers) - TOKENS, len(numbers)), q.split(TOKENS, 1), strict=True):
            some = slice(max(stop - 3 * TOKENS, 0), stop)
            answers.append(super().read(queries, k[:, some], v[:, some], numbers[some]))
        return torch.cat(answers, dim=1)


class InTiles(FramesBackwards):
    """The rows of a frame lie in another order than its tokens."""

    def order(self) -> Tensor:
        return (torch.arange(CHUNK // TOKENS)[:, None] * TOKENS + torch.tensor(TILES)).flatten()


class FramesInterleaved(FramesBackwards):
    """Token by token: of each token all frames."""

    def order(self) -> Tensor:
        return torch.arange(CHUNK).view(-1, TOKENS).T.flatten()


class OneFrameInTiles(FramesBackwards):
    """Of a chunk's last frame alone."""

    def order(self) -> Tensor:
        return torch.cat([torch.arange(CHUNK - TOKENS), CHUNK - TOKENS + torch.tensor(TILES)])


class TilesThatAreReadBack(InTiles):
    """As they are read, too, they are brought in the order of tokens: their place in the cache is what counts."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        place = numbers.argsort()
        return super().read(q, k[:, place], v[:, place], numbers[place])


EXACT = (Numbered, ReadsLess, ReadsWithoutAFrame, KeepsLess, MergesKeys, TwoKernels, FramesBackwards, MadeAnew)
REFUSED = {
    KeepsMore: "a layer sees 24 keys where 16 are known",
    HeadsApart: "a layer attends with 1 heads",
    HeadsApartAlike: "a layer attends with 1 heads",
    HeadsApartInAll: "no rows of the KV cache",
    TextAmongRows: "at most: does it keep more",
    FrameOfText: "at most: does it keep more",
    Merged: "no rows of the KV cache",
    ReadsEverySecond: "some rows of finished frames are gone",
    Gated: "no rows of the KV cache",
    Latent: "no rows of the KV cache",
    FramesApart: "different rows in the same places",
    InTiles: "another order than its tokens",
    FramesInterleaved: "another order than its tokens",
    OneFrameInTiles: "another order than its tokens",
    TilesThatAreReadBack: "another order than its tokens",
}


def in_place(cache: Any) -> Any:
    return cache


def moved(cache: Any) -> Any:
    """To the CPU and back, in lists and dicts made anew."""
    return [{name: part.clone() for name, part in layer.items()} for layer in cache]


def moved_alone(cache: Any) -> Any:
    """The same, in the lists and dicts that the sampler has."""
    for layer in cache:
        layer.update(moved([layer])[0])
    return cache


def rollout(
    generator: Any,
    cache: Any,
    pruned: Callable[[int], bool] = lambda chunk: False,
    before_call: Callable[[Any], Any] = in_place,
) -> Tensor:
    """Seven chunks of two frames; where ``pruned(chunk)``, a chunk's first call is made again."""
    torch.manual_seed(1)
    chunks = []
    for chunk in range(CHUNKS):
        x0 = torch.randn(1, 2, 4, 4, 4)
        for step in (1000, 500, 0):
            cache = before_call(cache)
            for _ in range(1 + (step == 1000 and pruned(chunk))):
                given = x0 + 0.1 if step else x0
                _, answer = generator(given, {}, torch.full((1, 2), step), cache, None, chunk * CHUNK)
            x0 = answer if step else x0
        chunks.append(x0)
    return torch.cat(chunks, dim=1)


def numbered(kind: type[SelfAttention]) -> Fork:
    Numbered.layers = 0
    return fork_of(kind)


def reference(kind: type[SelfAttention], home: types.ModuleType, at: int, persist: bool = True) -> Tensor:
    """With -inf at the dead; where they do not persist, in the denoising calls of chunk ``at`` alone."""
    dead: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gone = torch.isin(Numbered.now, torch.cat([*dead, torch.zeros(0)]))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(gone, float("-inf")).softmax(-1), v)

    def prune(chunk: int) -> bool:
        old = torch.arange(at * CHUNK)
        dead.extend([old[torch.isin(old % TOKENS, torch.tensor(DEAD))]] if chunk == at else [])
        return chunk == at

    def alive_again(cache: Any) -> Any:
        nonlocal calls
        calls += 1
        if not persist and calls == 3 * at + 3:  # the commit of that chunk
            dead.clear()
        return cache

    calls = 0
    home.attention = attention  # type: ignore[attr-defined]
    video = rollout(numbered(kind), cache_of(), prune, alive_again)
    home.attention = plain_attention  # type: ignore[attr-defined]
    return video


@pytest.mark.parametrize("at", (2, 4, 5))
@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.__name__)
def test_exact(kind: type[SelfAttention], at: int, home: types.ModuleType) -> None:
    fork, expected = numbered(kind), reference(kind, home, at)
    with tokentrim.patched(fork, ForcedPolicy({at: DEAD})) as handle:
        ours = rollout(fork, cache_of())
    assert [record.chunk for record in handle.report if record.pruned] == [at]
    assert float((ours - rollout(numbered(kind), cache_of())).abs().max()) > 1e-4
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)


class Kept:
    """As ``way``, and whoever moved it keeps what was there, as an offload does that has memory for both.

    Args:
        way: how it is moved. calls: before which calls, all if None.
    """

    def __init__(self, way: Callable[[Any], Any], calls: Sequence[int] | None = None) -> None:
        self.way, self.calls, self.made = way, calls, 0
        self.there: list[Any] = []

    def __call__(self, cache: Any) -> Any:
        self.made += 1
        if self.calls is None or self.made - 1 in self.calls:
            self.there.append([dict(layer) for layer in cache])
            cache = self.way(cache)
        self.last = cache
        return cache

    def marks(self) -> int:
        return sum(int((~layer["v"].isfinite()).sum()) for cache in (*self.there, self.last) for layer in cache)


def in_turns() -> Callable[[Any], Any]:
    """Copied to and fro between two buffers, at every call."""
    buffers = [cache_of(), cache_of()]

    def turn(cache: Any) -> Any:
        other = buffers[cache[0]["v"] is buffers[0][0]["v"]]
        for layer, old in zip(other, cache, strict=True):
            for name in old:
                layer[name].copy_(old[name])
        return other

    return turn


WAYS: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "moved": lambda: moved,
    "moved alone": lambda: moved_alone,
    "kept": lambda: Kept(moved),
    "kept alone": lambda: Kept(moved_alone),
    "two buffers": in_turns,
}


@pytest.mark.parametrize("persist", (True, False), ids=("persists", "one chunk"))
@pytest.mark.parametrize("at", (2, 5))
@pytest.mark.parametrize("way", WAYS)
def test_other_memory_at_every_call(way: str, at: int, persist: bool, home: types.ModuleType) -> None:
    """Offloaded and fetched again: one video, whose marks go with it and come off where they are."""
    fork, expected, move = numbered(Numbered), reference(Numbered, home, at, persist), WAYS[way]()
    with tokentrim.patched(fork, ForcedPolicy({at: DEAD}, persist=persist)) as handle:
        ours = rollout(fork, cache_of(), before_call=move)
    assert [(record.video, record.chunk) for record in handle.report] == [(0, chunk) for chunk in range(CHUNKS)]
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)
    assert not isinstance(move, Kept) or not move.marks(), "a mark is left"


@pytest.mark.parametrize("persist", (True, False), ids=("persists", "one chunk"))
def test_other_memory_at_any_call(persist: bool, home: types.ModuleType) -> None:
    expected = reference(Numbered, home, 2, persist)
    for call in range(3 * CHUNKS):
        fork, move = numbered(Numbered), Kept(moved, [call])
        with tokentrim.patched(fork, ForcedPolicy({2: DEAD}, persist=persist)) as handle:
            ours = rollout(fork, cache_of(), before_call=move)
        assert {record.video for record in handle.report} == {0} and not move.marks()
        assert torch.allclose(ours, expected, atol=1e-5, rtol=0), call


@pytest.mark.parametrize("kind", (Numbered, MadeAnew), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("at", (2, 4, 5))
def test_pruned_for_one_chunk(kind: type[SelfAttention], at: int, home: types.ModuleType) -> None:
    """Also where the model itself makes the cache's tensors anew, in the replay too."""
    fork, expected = numbered(kind), reference(kind, home, at, persist=False)
    with tokentrim.patched(fork, ForcedPolicy({at: DEAD}, persist=False)):
        ours = rollout(fork, cache_of())
    assert float((ours - reference(kind, home, at)).abs().max()) > 1e-4, "as if it persisted"
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("at", (2, 4, 5))
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused(kind: type[SelfAttention], at: int) -> None:
    fork = numbered(kind)
    with tokentrim.patched(fork, ForcedPolicy({at: DEAD})), pytest.raises(UnsupportedContextError, match=REFUSED[kind]):
        rollout(fork, cache_of())


class Guided(Fork):
    """Guidance inside: both branches are samples of one call and of one cache."""

    def forward(self, noisy_image_or_video: Tensor, *rest: Any, **given: Any) -> tuple[Tensor, Tensor]:
        flow, x0 = super().forward(torch.cat([noisy_image_or_video, noisy_image_or_video / 2]), *rest, **given)
        return flow[:1], x0.mean(0, keepdim=True)

    forward.__signature__ = inspect.signature(Fork.forward)  # type: ignore[attr-defined]


def two_samples() -> list[dict[str, Any]]:
    """A cache of two samples."""
    cache = cache_of()
    for layer in cache:
        layer.update({name: layer[name].repeat(2, 1, 1, 1) for name in "kv"})
    return cache


@pytest.mark.parametrize("policy", (ForcedPolicy({2: DEAD}), CommitWindow(1)), ids=("prunes", "hides"))
def test_a_cache_of_both_branches_of_guidance_is_refused(policy: Policy) -> None:
    """The second branch's rows would stay."""
    fork = numbered(Numbered)
    fork.__class__ = type("GuidedFork", (Guided,), {})
    words = "holds 2 samples for a call of 1"
    with tokentrim.patched(fork, policy), pytest.raises(UnsupportedContextError, match=words):
        rollout(fork, two_samples())


@pytest.mark.parametrize("kind", (TextAmongRows, FrameOfText), ids=lambda kind: kind.__name__)
def test_nothing_is_hidden_where_rows_are_more_than_frames(kind: type[SelfAttention]) -> None:
    fork = numbered(kind)
    with tokentrim.patched(fork, CommitWindow(1)), pytest.raises(UnsupportedContextError, match="does it keep more"):
        rollout(fork, cache_of())
