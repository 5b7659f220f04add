"""Pages of a pool (examples/engines/vllm_omni), without vLLM-Omni: which frames a call reads, and which rows are left.

The kernel here is written out, and the reference has -inf at the dead keys. On vLLM-Omni's own code:
``tests/upstream/test_vllm_omni.py``.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from engine_adapters import engine_adapters

import tokentrim_hooks as tokentrim
from tokentrim_hooks import CallTap, KeyLayout, Role, Segment
from tokentrim_hooks.pruning.key_selection import DeadTokens

engine_adapters()  # puts the plugins' folders on the path

from tokentrim_vllm_omni.pages import Pages, Window  # noqa: E402

SIZE, HEADS, DIM, GRID = 6, 2, 4, (2, 3)
TABLE = [5, 2, 7, 1]
"""Pages of four frames, in no order; the last one is the chunk's own."""


class Inputs(NamedTuple):
    """What vLLM-Omni hands to its operator, as far as it is read here."""

    key_pool: Any
    value_pool: Any
    block_size: int
    video_slots: Any
    block_table: Any
    seq_lens: Any
    query_start_loc: Any = None
    max_query_len: int = SIZE
    max_seq_len: int = 6 * SIZE
    stage_key: Any = None
    stage_value: Any = None
    reuse_history: bool = False


def paged(query, keys, values, *, block_table, seq_lens, softmax_scale=1.0, dead=(), **_):
    """Attention over the pages that the table names, ``[T, heads, head_dim]``; -inf at ``dead`` rows."""
    length = int(seq_lens[0])
    k, v = (pages[block_table[0].long()].flatten(0, 1)[:length] for pages in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, k) * softmax_scale
    scores[..., list(dead)] = float("-inf")
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def operator(inputs, query, key, value, _key_act, _value_act, scale, dead=()):
    """Write the chunk's rows, then attend."""
    for pool, rows in ((inputs.key_pool, key), (inputs.value_pool, value)):
        pool[inputs.video_slots] = rows
    pages = (pool.unflatten(0, (-1, SIZE)) for pool in (inputs.key_pool, inputs.value_pool))
    which = {"block_table": inputs.block_table, "seq_lens": inputs.seq_lens}
    return paged(query, *pages, **which, softmax_scale=scale, dead=dead)


def made():
    """Operator's inputs, and the chunk's query, key and value."""
    torch.manual_seed(0)
    pools = [torch.randn(9 * SIZE, HEADS, DIM) for _ in range(2)]
    table = torch.tensor([[*TABLE, 0, 0]], dtype=torch.int32)
    slots = TABLE[-1] * SIZE + torch.arange(SIZE)
    inputs = Inputs(*pools, SIZE, slots, table, torch.tensor([len(TABLE) * SIZE], dtype=torch.int32))
    return inputs, [torch.randn(SIZE, HEADS, DIM) for _ in range(3)]


def tap(dead):
    """The tap of a call in which these (frame, token) are dead; frame 0 is a sink."""
    roles = ((Role.ANCHOR, (0,)), (Role.CONTEXT, (3, 4)), (Role.CURRENT, (5,)))
    layout = KeyLayout(tuple(Segment(role, frames, *GRID) for role, frames in roles))
    killed = {frame: torch.full((1, SIZE), 2**62) for frame, _ in dead}
    for frame, token in dead:
        killed[frame][0, token] = 5
    return CallTap(layout, DeadTokens(killed_by=killed, grid=GRID))


CASES = {
    "single rows": [(3, 1), (4, 1), (4, 5)],
    "a whole frame": [(3, token) for token in range(SIZE)],
    "two whole frames": [(frame, token) for frame in (3, 4) for token in range(SIZE)],
    "a frame's worth of rows, of two frames": [(3, 0), (3, 1), (3, 2), (4, 3), (4, 4), (4, 5)],
}


@pytest.mark.parametrize("name", CASES)
def test_a_session_reads_what_lives(name):
    dead, (inputs, rows) = CASES[name], made()
    place = {3: SIZE, 4: 2 * SIZE}
    expected = operator(*[made()[0]], *rows, None, None, 0.5, dead=[place[frame] + token for frame, token in dead])
    asked, pages = [], Pages(paged)
    found = pages.write_and_attend(
        tap(dead), lambda given, *args: asked.append(given) or operator(given, *args), inputs, *rows, None, None, 0.5
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert [int(given.seq_lens) for given in asked] == ([(4 - len(dead) // SIZE) * SIZE] if "whole" in name else [])
    assert torch.equal(inputs.value_pool[inputs.video_slots], rows[2]), "the chunk's rows are written all the same"
    untouched = [row for row in range(9 * SIZE) if row not in inputs.video_slots.tolist()]
    assert torch.equal(inputs.value_pool[untouched], made()[0].value_pool[untouched]), "nothing is marked in the pool"


def test_with_nothing_dead_the_operator_is_asked_as_ever():
    inputs, rows = made()
    asked = []
    Pages(paged).write_and_attend(tap([]), lambda *args: asked.append(args), inputs, *rows, None, None, 0.5)
    assert asked[0][0] is inputs and len(asked) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_staged_window_is_made_whole_first(name):
    """Later calls read the copy: it must not lack what was left out of this one."""
    (inputs, rows), asked = made(), []
    staged = inputs._replace(stage_key=torch.zeros(1), reuse_history=True)

    def asks(given, *args):
        asked.append(given)
        return operator(given, *args)

    Pages(paged).write_and_attend(tap(CASES[name]), asks, staged, *rows, None, None, 0.5)
    assert asked[0] is staged
    assert all(given.stage_key is None and not given.reuse_history for given in asked[1:])


def test_frames_of_a_single_request():
    def window(end, start, last_start, rows=8):
        layer = SimpleNamespace(value=torch.zeros(1, rows * SIZE, 1, 1), end=end * SIZE, last_start=last_start)
        return Window.of(layer, range(start, start + 2), SIZE, 1)

    assert window(0, 0, None).frames == (0, 1)
    assert window(4, 4, 2 * SIZE).frames == (0, 1, 2, 3, 4, 5)
    assert window(8, 8, 6 * SIZE).frames == (0, 3, 4, 5, 6, 7, 8, 9), "two leave behind the sink"
    assert window(8, 10, 10 * SIZE).frames == (0, 5, 6, 7, 8, 9, 10, 11), "written already, after two had left"
    assert window(8, 8, 6 * SIZE).parts(8) == [
        (Role.ANCHOR, (0,)), (Role.CONTEXT, (3, 4, 5, 6, 7)), (Role.CURRENT, (8, 9)),
    ]  # fmt: skip


def session(held, start, room=6, sinks=2, read=0):
    spec = SimpleNamespace(sink_chunks=sinks)
    pages = SimpleNamespace(
        block_size=SIZE, adapter=object(), history_block_ids=list(range(held)), max_video_tokens=room * SIZE,
        kv_cache=SimpleNamespace(spec=spec), kv_len=read,
    )  # fmt: skip
    return Window.of(SimpleNamespace(forward_ctx=pages), range(start, start + 2), SIZE, 9)


def test_frames_of_a_session():
    assert session(0, 0).frames == (0, 1) and session(4, 4).frames == (0, 1, 2, 3, 4, 5)
    assert session(6, 10).frames == (0, 1, 8, 9, 10, 11)
    assert session(6, 10).parts(10)[0] == (Role.ANCHOR, (0, 1))
    assert session(6, 10, sinks=0).frames == (6, 7, 8, 9, 10, 11)


def test_a_session_that_reads_other_rows_is_refused():
    session(6, 10, read=6 * SIZE).require(6 * SIZE)
    with pytest.raises(tokentrim.UnsupportedContextError, match="has read"):
        session(6, 10, read=7 * SIZE).require(6 * SIZE)
