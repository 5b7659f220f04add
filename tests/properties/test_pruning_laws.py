"""Laws of pruning: attention on live keys equals attention with -inf at the dead ones; marks travel with their rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokentrim_hooks import CacheRows, KeyLayout, Role, Segment, UnsupportedContextError
from tokentrim_hooks.pruning.key_selection import DeadTokens, QueryGroup
from tokentrim_hooks.pruning.live_keys import attend_live, live_keys
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.pruning.tombstones import Tombstones, alive_rows, clear_marks
from tokentrim_hooks.testing import strategies as some

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}


def attend(q, k, v, mask):
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


def by_hand(q, k, v, bias):
    """Attention in float64 with an additive bias ``[B, heads, queries, keys]`` that holds -inf at dead keys."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    return (scores.softmax(-1) @ v).transpose(1, 2)


def qkv(batch, queries, keys, seed, dtype):
    shapes = [(batch, queries, 2, 4), (batch, keys, 2, 4), (batch, keys, 2, 4)]
    return [some.normal(shape, seed + i).to(dtype) for i, shape in enumerate(shapes)]


sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 12))


masks = st.sampled_from(["none", "bool", "float", "rows"])


@given(sizes, some.seeds(), st.sampled_from(list(TOLERANCE)), masks, st.data())
def test_live_attention_equals_minus_infinity(size, seed, dtype, masked, data):
    batch, queries, keys = size
    q, k, v = qkv(batch, queries, keys, seed, dtype)
    dead = data.draw(some.dead_keys(batch, keys))
    mask, bias = _mask(masked, batch, queries, keys, dead, seed, dtype)
    keeps = live_keys([QueryGroup(0, None, ~dead)], CPU)
    expected = by_hand(q, k, v, bias + _minus_infinity(dead))
    actual = attend_live(attend, q, k, v, mask, keeps)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def _minus_infinity(dead):
    return torch.zeros(dead.shape, dtype=torch.float64).masked_fill(dead, -torch.inf)[:, None, None, :]


def _mask(kind, batch, queries, keys, dead, seed, dtype):
    """A mask in the way a model gives it, and the same as an additive float64 bias."""
    if kind == "none":
        return None, torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    values = some.normal((batch if kind != "rows" else 1, 1, queries, keys), seed + 9)
    if kind != "bool":
        return values.to(dtype), values.to(dtype).double()
    allowed = values > 0
    allowed |= ~dead[:, None, None, :]  # whoever is alive may be seen, so that no row is empty
    return allowed, torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


@given(sizes, some.seeds(), st.data())
def test_query_groups_see_their_own_keys(size, seed, data):
    batch, queries, keys = size
    q, k, v = qkv(batch, queries + 1, keys, seed, torch.float32)
    cut = data.draw(st.integers(1, queries))
    dead = [data.draw(some.dead_keys(batch, keys)) for _ in range(2)]
    groups = [QueryGroup(0, cut, ~dead[0]), QueryGroup(cut, queries + 1, ~dead[1])]
    bias = torch.cat([_minus_infinity(dead[0]).expand(-1, 2, cut, -1),
                      _minus_infinity(dead[1]).expand(-1, 2, queries + 1 - cut, -1)], dim=2)  # fmt: skip
    actual = attend_live(attend, q, k, v, None, live_keys(groups, CPU))
    torch.testing.assert_close(actual.double(), by_hand(q, k, v, bias), rtol=0, atol=1e-5)


@given(st.integers(1, 3), some.seeds())
def test_a_sample_without_any_key_is_refused(batch, seed):
    alive = torch.ones(batch, 4, dtype=torch.bool)
    alive[seed % batch] = False
    with pytest.raises(UnsupportedContextError, match="no key"):
        live_keys([QueryGroup(0, None, alive)], CPU)


# ----------------------------------------------------------------------------------------------- tombstones

PER_FRAME, FRAMES = 4, 6


def cache(seed, batch=2, layers=2, dtype=torch.float32):
    return [some.normal((batch, PER_FRAME * FRAMES, 2, 3), seed + i).to(dtype) for i in range(layers)]


chosen = st.lists(st.sets(st.integers(0, PER_FRAME - 1), max_size=PER_FRAME - 1).map(sorted), min_size=2, max_size=2)


@given(chosen, some.seeds(), st.integers(0, 2), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_marks_lie_on_exactly_the_chosen_rows_and_come_off(tokens, seed, sinks, anchors_too, dtype):
    values = cache(seed, dtype=dtype)
    before = [v.clone() for v in values]
    stop = PER_FRAME * 5
    rows = CacheRows(values, 0, stop, PER_FRAME, anchors=sinks * PER_FRAME)
    marks = Tombstones()
    count = marks.mark(rows, tokens, anchors_too)
    first = 0 if anchors_too else sinks * PER_FRAME
    expected = {(b, r) for b in range(2) for r in range(first, stop) if r % PER_FRAME in tokens[b]}
    for value in values:
        assert {tuple(place) for place in (~alive_rows(value)).nonzero().tolist()} == expected
    assert count == len(expected)
    marks.revive()
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


@given(chosen, some.seeds(), st.integers(1, 5), st.integers(0, 2))
def test_marks_travel_with_rolls_and_copies_and_die_when_overwritten(tokens, seed, evicted, sinks):
    """Self-Forcing's roll: rows behind the sink move left, the freed rows at the end are written anew."""
    values = cache(seed)
    Tombstones().mark(CacheRows(values, 0, PER_FRAME * FRAMES, PER_FRAME, sinks * PER_FRAME), tokens)
    identity = torch.arange(PER_FRAME * FRAMES).repeat(2, 1)
    dead = ~alive_rows(values[0])
    evicted = min(evicted, FRAMES - sinks)
    sink, gap = sinks * PER_FRAME, evicted * PER_FRAME
    for value in [*values, identity, dead]:
        value[:, sink : value.shape[1] - gap] = value[:, sink + gap :].clone()
    for value in values:
        value[:, value.shape[1] - gap :] = 1.0
    dead[:, dead.shape[1] - gap :] = False
    for value in values:
        assert torch.equal(~alive_rows(value), dead)
        assert torch.equal(~alive_rows(value.clone().flip(0)), dead.flip(0))
    clear_marks(values)
    assert all(bool(torch.isfinite(value).all()) for value in values)


@given(chosen, some.seeds())
def test_the_tap_drops_marked_rows(tokens, seed):
    values = cache(seed, layers=1)
    q, k = qkv(2, 3, PER_FRAME * FRAMES, seed + 5, torch.float32)[:2]
    k, clean = k[:, :, :, :3], values[0].clone()
    Tombstones().mark(CacheRows(values, 0, PER_FRAME * FRAMES, PER_FRAME), tokens)
    dead = torch.tensor([[r % PER_FRAME in chosen for r in range(PER_FRAME * FRAMES)] for chosen in tokens])
    actual = CallTap(None, DeadTokens()).attend(attend, q[..., :3], k, values[0], None)
    expected = by_hand(q[..., :3], k, clean, _minus_infinity(dead))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_integer_caches_are_refused():
    with pytest.raises(UnsupportedContextError, match="int8"):
        Tombstones().mark(CacheRows([torch.zeros(1, 8, 1, 1, dtype=torch.int8)], 0, 8, 4), [[1]])


def test_fp8_marks_are_seen():
    value = torch.ones(1, 8, 1, 2).to(torch.float8_e4m3fn)
    Tombstones().mark(CacheRows([value], 0, 8, 4), [[1]])
    assert alive_rows(value).tolist() == [[True, False, True, True, True, False, True, True]]


# ----------------------------------------------------------------------------------------------- dead


@given(some.key_layouts(), st.integers(1, 2), st.data())
def test_the_ledger_kills_the_tokens_of_context_frames_only(layout, samples, data):
    height, width = layout.segments[0].height, layout.segments[0].width
    tokens = _tokens(data, samples, height * width)
    dead, current = DeadTokens(), layout.segments[-1].frames[0]
    dead.kill(layout, tokens, current, (height, width))
    groups = dead.live(layout, samples)
    assert (groups[0].start, groups[-1].stop) == (0, layout.length), "every query has a group"
    assert torch.equal(groups[-1].alive, ~_expected(layout, tokens, {Role.CONTEXT, Role.FLIGHT}))


@given(some.key_layouts(), st.data())
def test_chunks_in_flight_do_not_lose_what_later_chunks_lose(layout, data):
    """Queries of a chunk in flight see its own frames whole; queries of the newest chunk do not."""
    height, width = layout.segments[0].height, layout.segments[0].width
    tokens = _tokens(data, 1, height * width)
    dead = DeadTokens()
    dead.kill(layout, tokens, layout.segments[-1].frames[0], (height, width))
    groups = dead.live(layout, 1)
    if len(groups) == 1:
        return
    for segment, group in zip(layout.segments, groups, strict=True):
        if segment.role is Role.FLIGHT:
            assert torch.equal(group.alive, ~_expected(layout, tokens, {Role.CONTEXT})), "flight is whole to itself"


@given(some.key_layouts(), st.data())
def test_anchors_die_only_on_request(layout, data):
    height, width = layout.segments[0].height, layout.segments[0].width
    tokens = _tokens(data, 1, height * width)
    dead = DeadTokens(prune_anchors=True)
    dead.kill(layout, tokens, layout.segments[-1].frames[0], (height, width))
    expected = _expected(layout, tokens, {Role.CONTEXT, Role.FLIGHT, Role.ANCHOR})
    assert torch.equal(dead.live(layout, 1)[-1].alive, ~expected)


@given(some.key_layouts((Role.CONTEXT,)), st.data())
def test_reviving_what_a_chunk_killed_brings_back_only_its_own(layout, data):
    height, width = layout.segments[0].height, layout.segments[0].width
    first, second = (_tokens(data, 1, height * width) for _ in range(2))
    dead = DeadTokens()
    dead.kill(layout, first, 100, (height, width))
    dead.kill(layout, second, 200, (height, width))
    dead.revive(200)
    assert torch.equal(dead.live(layout, 1)[-1].alive, ~_expected(layout, first, {Role.CONTEXT}))
    dead.revive(100)
    assert dead.live(layout, 1)[-1].alive.all()


def _tokens(data, samples, count):
    some_tokens = st.sets(st.integers(0, count - 1)).map(sorted)
    return data.draw(st.lists(some_tokens, min_size=samples, max_size=samples))


def _expected(layout, tokens, roles):
    """Dead keys, counted out by hand."""
    rows = []
    for chosen_tokens in tokens:
        row = []
        for segment in layout.segments:
            frame = [segment.role in roles and t in chosen_tokens for t in range(segment.height * segment.width)]
            row += frame * len(segment.frames)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool)


def test_a_layout_that_does_not_fit_the_keys_is_refused():
    layout = KeyLayout((Segment(Role.CONTEXT, [0], 1, 2), Segment(Role.CURRENT, [1], 1, 2)))
    dead = DeadTokens()
    dead.kill(layout, [[0]], 1, (1, 2))
    q, k, v = qkv(1, 2, 5, 0, torch.float32)
    with pytest.raises(UnsupportedContextError, match=r"5 keys.*says 4"):
        CallTap(layout, dead).attend(attend, q, k, v, None)
