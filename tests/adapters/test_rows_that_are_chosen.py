"""Forks that choose which rows they keep, where nothing else of them is new: refused as soon as they have chosen.

A prune finds a token by its place in the cache. Where each head or layer keeps rows of its own, or tokens are kept one
by one, a place says nothing of the token; all of these were wrong in silence, or blamed the model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_memory_made_of_rows import (
    MADE_OF_ROWS,
    POLICY,
    WINDOW,
    Bank,
    BankOfTheNewest,
    CopiedSink,
    fork_of,
    home,
    rollout,
)
from test_unknown_forks import DEAD, TOKENS, SelfAttention, cache_of
from tokentrim_hooks_adapters.self_forcing import SelfForcing
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import TokenTrimWarning, UnsupportedContextError
from tokentrim_hooks.pruning.frames import WholeFrames
from tokentrim_hooks.pruning.layers import LayersAlike
from tokentrim_hooks.testing import ForcedPolicy

assert home  # the fixture that gives the fork's attention a namespace


class Choosing(SelfAttention):
    """``kept(keys, head, layer, room)`` are the rows of a full cache that stay, in their order."""

    layers = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = Choosing.layers % 2
        Choosing.layers += 1

    def forward(self, x: Tensor, kv_cache: dict[str, Any], current_start: int) -> Tensor:
        q, k, v = (part.unflatten(2, (2, -1)) for part in self.qkv(x).chunk(3, -1))
        new, end, filled = x.shape[1], current_start + x.shape[1], int(kv_cache["local_end_index"])
        if end > int(kv_cache["global_end_index"]):
            if filled + new > WINDOW:
                filled = self.evict(kv_cache, filled, WINDOW - new)
            filled += new
            kv_cache["global_end_index"].fill_(end)
            kv_cache["local_end_index"].fill_(filled)
        kv_cache["k"][:, filled - new : filled], kv_cache["v"][:, filled - new : filled] = k, v
        return x + self.o(self.attend(q, kv_cache["k"][:, :filled], kv_cache["v"][:, :filled]).flatten(2))

    def evict(self, cache: dict[str, Any], filled: int, room: int) -> int:
        for head in range(2):
            rows = self.kept(cache["k"][0, :filled, head], head, room)
            for name in "kv":
                cache[name][:, : len(rows), head] = cache[name][:, rows, head].clone()
        return room

    def kept(self, keys: Tensor, head: int, room: int) -> Tensor:
        raise NotImplementedError


def oldest_or_newest(keys: Tensor, oldest: int, room: int) -> Tensor:
    return torch.arange(room) + (0 if oldest else len(keys) - room)


class PerHead(Choosing):
    """One head looks far back, the other at what was last."""

    def kept(self, keys: Tensor, head: int, room: int) -> Tensor:
        return oldest_or_newest(keys, head, room)


class PerLayer(Choosing):
    """The first layer looks at what was last, the other one far back."""

    def kept(self, keys: Tensor, head: int, room: int) -> Tensor:
        return oldest_or_newest(keys, self.layer, room)


class PerLayerTurnedRound(Choosing):
    """The first layer looks far back: its marks are there, where the other has none."""

    def kept(self, keys: Tensor, head: int, room: int) -> Tensor:
        return oldest_or_newest(keys, 1 - self.layer, room)


class PerToken(Choosing):
    """Every second token of the old frames."""

    def kept(self, keys: Tensor, head: int, room: int) -> Tensor:
        return torch.arange(len(keys))[-2 * room :: 2] if len(keys) >= 2 * room else torch.arange(len(keys))[-room:]


class PerTokenAndRecent(Choosing):
    """One token of every old frame, all of the newest one's."""

    def kept(self, keys: Tensor, head: int, room: int) -> Tensor:
        old = torch.arange(0, len(keys) - TOKENS, 2)[-(room - TOKENS) :]
        return torch.cat([old, torch.arange(len(keys) - TOKENS, len(keys))])


class PerTokenByKeys(Choosing):
    """The tokens with the largest keys, head by head and layer by layer."""

    def kept(self, keys: Tensor, head: int, room: int) -> Tensor:
        return keys.norm(dim=-1).topk(room).indices.sort().values


KINDS = (PerHead, PerLayer, PerLayerTurnedRound, PerTokenAndRecent, PerTokenByKeys)
WORDS = r"no rows of the KV cache|different rows in the same places|some rows of finished frames are gone"


@pytest.mark.parametrize("at", (2, 4, 5))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_rows_that_are_chosen_are_refused(kind: type[Choosing], at: int) -> None:
    """Whether they were chosen before the prune or are after it; none of it is taken for a model that diverged."""
    fork = fork_of(kind)
    with tokentrim.patched(fork, ForcedPolicy({at: DEAD})), pytest.raises(UnsupportedContextError, match=WORDS):
        rollout(fork, cache_of())


class KeepsMemory(SelfForcing):
    """An adapter that says that it keeps the model's other memory right: that is no word on where tokens are."""

    keeps_memory = True


@pytest.mark.parametrize("at", (2, 4, 5))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_they_are_refused_beside_other_memory_as_well(kind: type[Choosing], at: int) -> None:
    fork, words = fork_of(kind), WORDS.replace("no rows of the KV cache", "rows of the KV cache in some heads only")
    with (
        tokentrim.patched(fork, ForcedPolicy({at: DEAD}), adapter=KeepsMemory),
        pytest.raises(UnsupportedContextError, match=words),
    ):
        rollout(fork, cache_of())


@pytest.mark.parametrize("at", (2, 4, 5))
@pytest.mark.parametrize("kind", (*MADE_OF_ROWS, Bank, CopiedSink, BankOfTheNewest), ids=lambda kind: kind.__name__)
def test_other_memory_of_whole_rows_is_left_to_such_an_adapter(kind: type[Choosing], at: int) -> None:
    fork = fork_of(kind)
    with tokentrim.patched(fork, ForcedPolicy({at: DEAD}), adapter=KeepsMemory) as handle:
        rollout(fork, cache_of())
    assert [record.chunk for record in handle.report if record.pruned] == [at]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_with_warn_the_video_goes_on(kind: type[Choosing]) -> None:
    fork, cache = fork_of(kind), cache_of()
    words = f"{WORDS}|reached attention that is not tapped"
    with pytest.warns(TokenTrimWarning, match=words), tokentrim.patched(fork, POLICY, on_error="warn") as handle:
        video = rollout(fork, cache)
    assert bool(video.isfinite().all()) and not handle.active
    assert all(bool(layer["v"].isfinite().all()) for layer in cache)


def test_frames_may_leave_as_a_whole_and_one_may_be_cut() -> None:
    """By the edge of a window; rows that are alike in several frames tell nothing."""
    rows = torch.arange(4 * TOKENS)[None]
    frames, places = WholeFrames(rows, TOKENS), torch.arange(4 * TOKENS)
    for whole in (places, places[TOKENS:], places[:0], torch.cat([places[:TOKENS], places[-TOKENS:]]), places[2:]):
        assert not bool(frames.torn(rows[:, whole]))
    assert bool(frames.torn(rows[:, places[2:-2]])) and bool(frames.torn(rows[:, ::2]))
    alike = rows.clone()
    alike[:, places % TOKENS < 2] = 7  # black bars
    assert not bool(WholeFrames(alike, TOKENS).torn(alike[:, -TOKENS:]))
    assert not bool(WholeFrames(torch.zeros_like(rows), TOKENS).torn(torch.zeros(1, 3, dtype=torch.long)))


def test_a_model_that_diverged_is_not_taken_for_layers_apart() -> None:
    layers, values = LayersAlike(), torch.zeros(1, 6, 2, 4)
    layers.looks = True
    values[:, 2, 0, 0] = torch.inf
    for other in (values, torch.full_like(values, torch.nan).index_copy(1, torch.tensor([2]), values[:, 2:3])):
        layers.begin(values)
        layers.look(other)
        layers.require()
    layers.begin(values)
    layers.look(values.roll(1, 1))
    with pytest.raises(UnsupportedContextError, match="different rows"):
        layers.require()
    layers.require()  # said once
