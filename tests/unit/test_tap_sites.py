"""Where a tap can sit: a module's forward, a dict of functions, heads first, with lengths; and rows amid history."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokentrim_hooks import CacheRows
from tokentrim_hooks.patching.patches import Patches
from tokentrim_hooks.pruning.call_scope import scoped
from tokentrim_hooks.pruning.key_selection import DeadTokens
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.pruning.tombstones import Tombstones

Q, K, V = (torch.randn(1, n, 2, 4, generator=torch.Generator().manual_seed(n)) for n in (3, 6, 7))
V = V[:, :6].clone()
LIVE = [0, 1, 3, 5]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Attention(nn.Module):
    """An attention module with a weight, so that a copy is told from the original."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v) * self.scale


def through_tap(function: Any, *args: Any, **kwargs: Any) -> Any:
    with scoped(CallTap(None, DeadTokens())):
        return function(*args, **kwargs)


def marked() -> Tensor:
    values = V.clone()
    values[:, [2, 4], 0, 0] = float("inf")
    return values


def test_a_modules_forward_is_tapped_and_restored() -> None:
    """Instance attribute while patched, gone afterwards; nothing changes while nothing is dead."""
    module, patches = Attention(), Patches()
    before = dict(vars(module))
    patches.tap(module, "forward")
    assert torch.equal(module(Q, K, V), plain(Q, K, V))
    assert torch.equal(through_tap(module, Q, K, marked()), plain(Q, K[:, LIVE], V[:, LIVE]))
    patches.undo()
    assert dict(vars(module)) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_a_tapped_module_is_its_own(duplicate: Any) -> None:
    """Its forward runs with its own weight and knows no tap."""
    module, patches = Attention(), Patches()
    patches.tap(module, "forward")
    twin = duplicate(module)
    twin.scale.data.fill_(3)
    assert torch.equal(twin(Q, K, V), plain(Q, K, V) * 3)
    assert torch.equal(module(Q, K, V), plain(Q, K, V))
    assert not torch.isfinite(through_tap(twin, Q, K, marked())).all()
    patches.undo()
    assert torch.equal(twin(Q, K, V), plain(Q, K, V) * 3)


def test_a_dict_of_functions_with_heads_first_and_a_tuple() -> None:
    """As transformers keeps them: q, k, v ``[B, heads, length, head_dim]``, a mask, and (output, weights)."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        assert query.shape[1] == key.shape[1] == 2 and mask.shape[-1] == key.shape[2]
        return plain(*(x.transpose(1, 2) for x in (query, key, value))), None

    functions, patches = {"sdpa": attend}, Patches()
    patches.tap(functions, "sdpa", q="query", k="key", v="value", mask="mask", heads_first=True)
    q, k, v = (x.transpose(1, 2) for x in (Q, K, marked()))
    output, weights = through_tap(functions["sdpa"], q, k, v, torch.zeros(1, 1, 3, 6))
    assert torch.equal(output, plain(Q, K[:, LIVE], V[:, LIVE])) and weights is None
    patches.undo()
    assert functions == {"sdpa": attend}


def test_packed_heads_are_unpacked_for_us_only() -> None:
    """As ComfyUI keeps them: q, k, v ``[B, length, heads * head_dim]``, and the number of heads beside."""
    seen: list[tuple[int, ...]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, **_: Any) -> Tensor:
        seen.append(tuple(key.shape))
        return plain(*(x.unflatten(-1, (heads, -1)) for x in (query, key, value))).flatten(2)

    functions, patches = {"attend": attend}, Patches()
    patches.tap(functions, "attend", q="query", k="key", v="value", heads="heads")
    q, k, v = (x.flatten(2) for x in (Q, K, marked()))
    output = through_tap(functions["attend"], q, k, v, heads=2, further=1)
    assert torch.equal(output, plain(Q, K[:, LIVE], V[:, LIVE]).flatten(2)) and seen == [(1, len(LIVE), 8)]
    patches.undo()
    assert functions == {"attend": attend}


def test_lengths_follow_the_keys() -> None:
    """A kernel that is told how many keys are valid is told of fewer."""
    told: list[list[int]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        told.append(lengths.tolist())
        return plain(q, k, v)

    functions, patches = {"attend": attend}, Patches()
    patches.tap(functions, "attend", lengths="lengths")
    functions["attend"](Q, K, V, torch.tensor([6], dtype=torch.int32))
    through_tap(functions["attend"], Q, K, marked(), torch.tensor([6], dtype=torch.int32))
    patches.undo()
    assert told == [[6], [4]]


def _is_first(values: Tensor) -> bool:
    return float(values[0, 0, 0, 1]) == float(V[0, 0, 0, 1])


def test_only_some_calls_of_a_function_read_the_context() -> None:
    """Those of which ``only`` says so; of the others every key is seen, infinite ones and all."""
    functions, patches = {"attend": plain}, Patches()
    patches.tap(functions, "attend", only=_is_first)
    other = marked() + 1
    output, unseen = (through_tap(functions["attend"], Q, K, values) for values in (marked(), other))
    patches.undo()
    assert torch.equal(output, plain(Q, K[:, LIVE], V[:, LIVE]))
    assert not unseen.isfinite().all() and torch.equal(unseen.nan_to_num(), plain(Q, K, other).nan_to_num())


def test_rows_of_the_current_chunk_amid_history_are_spared() -> None:
    """A ring buffer of 4 frames of 2 rows: the sink and the slot of the current chunk get no mark."""
    values = torch.zeros(1, 8, 1, 4)
    rows = CacheRows([values], 0, 8, rows_per_frame=2, anchors=2, current=(4, 6))
    assert Tombstones().mark(rows, [[1]]) == 2
    assert [int(row) for row in values[0, :, 0, 0].isinf().nonzero()] == [3, 7]
