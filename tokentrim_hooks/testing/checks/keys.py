"""What attention kernels saw, compared with what they should have seen; and -inf at keys that are followed by value."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from tokentrim_hooks.testing.attention import Attention, Denoiser, KeyTracker, watch_attention
from tokentrim_hooks.testing.checks.basics import not_checked


def check_kernels(seen: Sequence[Attention], dead: int, held: int = 0, coarse: bool = False) -> None:
    """Assert that the call replayed after a prune drops ``dead`` keys, of all samples, in every layer over the context.

    The call before the replay has the same arguments and nothing dead, so it tells how many keys there were. A layer
    may be launched once, or once for every set of samples that keep the same keys; space may be folded into its batch.
    ``held``: rows of history in the cache, of all samples, where known: a model may read less than these.
    ``coarse``: a key may stand for several tokens, so all that is known is that no more keys go than tokens.
    """
    if not seen:
        raise not_checked("the model does not call scaled_dot_product_attention")
    assert all(one.finite for one in seen), "V with NaN or inf reached an attention kernel: a path was missed"
    calls: dict[int, list[Attention]] = {}
    for one in seen:
        calls.setdefault(one.call, []).append(one)
    folded = [layers for pair in itertools.pairwise(calls.values()) if (layers := _layers(*pair))]
    # A replay never sees more: two calls of which the second does are of two chunks.
    fewer = [layers for layers in folded if all(one.keys >= keys for one, keys in layers)]
    pruned = next((layers for layers in fewer if any(one.keys > keys for one, keys in layers)), None)
    assert pruned, "no attention kernel ever saw fewer keys than in the call before"
    width = max((a for a, b in pruned if a.keys != b), key=lambda layer: layer.keys)
    over = [(a.keys, b) for a, b in pruned if (a.keys, a.samples) == (width.keys, width.samples)]
    read = min(one.samples * (one.keys - one.queries) for one in seen if one.samples * one.keys == width.keys)
    if len(set(over)) == 1 and width.keys - over[0][1] < dead and read < held:
        raise not_checked(f"of {held} rows of history the model reads {read}; try an earlier chunk_to_prune")
    some = coarse and len(set(over)) == 1 and over[0][0] - over[0][1] <= dead
    assert some or all(n - m == dead for n, m in over), (
        f"keys of all samples per layer before and after the prune of {dead}: {over}"
    )


class _Layer(NamedTuple):
    """A layer in one call: its batch size, and keys of all samples together."""

    samples: int
    keys: int


def _layers(before: Sequence[Attention], after: Sequence[Attention]) -> list[tuple[_Layer, int]]:
    """Layers in one call, each with its keys of all samples in the next; nothing where they are not the same layers.

    Launches of the later call belong to one layer until they have had all samples of the earlier one.
    """
    later, found = iter(after), []
    for one in before:
        samples = keys = 0
        while samples < one.samples:
            launch = next(later, None)
            if launch is None or launch.queries != one.queries:
                return []
            samples, keys = samples + launch.samples, keys + launch.samples * launch.keys
        if samples != one.samples:
            return []
        found.append((_Layer(one.samples, one.samples * one.keys), keys))
    return found if next(later, None) is None else []


def evictions(seen: Sequence[Attention]) -> int:
    """How often, in one layer, rows that a finished chunk had written were seen no more from some call on."""
    best = 0
    for layer, tracker in _trackers(seen).items():
        calls = [set(one.rows) for one in seen if one.layer == layer]
        written = {row for chunk in tracker.chunks for row in chunk}
        last = {row: i for i, rows in enumerate(calls) for row in rows & written}
        best = max(best, len({i for i in last.values() if i < len(calls) - 1}))
    return best


def check_no_sink(seen: Sequence[Attention], per_frame: int) -> None:
    """Assert that no layer keeps keys of the first chunk while those of the second leave: a sink nobody declared.

    Keys that leave and come back, as Rolling Sink's first frames do, are none.
    """
    for layer, tracker in _trackers(seen).items():
        calls = [one for one in seen if one.layer == layer]
        if len(tracker.chunks) > 2 and not set(tracker.chunks[1]) <= set(calls[-1].rows):
            kept = len(_never_gone(calls, set(tracker.chunks[0]), set(tracker.chunks[1])))
            assert not kept, (
                f"layer {layer} keeps {kept} keys of the first chunk while those of the second leave: a sink. Declare "
                f"it, anchors={kept} in context() and anchor_frames={kept // per_frame} here"
            )


def _never_gone(calls: Sequence[Attention], first: set[int], second: set[int]) -> set[int]:
    """Keys of ``first`` in the last call, and in each with keys of ``second`` that reads more than its own rows."""
    with_second = [set(one.rows) for one in calls if one.keys > one.queries and second & set(one.rows)]
    return first.intersection(set(calls[-1].rows), *with_second)


def check_anchors(seen: Sequence[Attention], keys: int) -> None:
    """Assert that the first ``keys`` keys of the first call are in every later call of the same layer."""
    trackers = _trackers(seen)
    followed = [layer for layer, tracker in trackers.items() if tracker.chunks]
    if not followed:
        raise not_checked("the context is computed anew in every call, so anchors cannot be told by value")
    for layer in followed:
        calls = [one for one in seen if one.layer == layer]
        anchors = set(trackers[layer].chunks[0][:keys])
        after = [one for one in calls if one.rows and anchors & set(one.rows)]
        assert after and after[-1] is calls[-1], f"layer {layer} has lost all anchors"
        missing = [len(anchors - set(one.rows)) for one in after]
        settled = missing[missing.index(0) :]
        assert not any(settled), f"layer {layer} misses {max(settled)} of {len(anchors)} anchor keys"


def _trackers(seen: Sequence[Attention]) -> dict[int, KeyTracker]:
    trackers: dict[int, KeyTracker] = {}
    for one in seen:
        trackers.setdefault(one.layer, KeyTracker()).see(one.rows)
    return trackers


def run_with_dead_keys(
    run: Callable[[], Tensor],
    denoisers: Sequence[Denoiser],
    chunk: int,
    tokens: Sequence[int],
    per_frame: int,
    anchors: int,
    calls: Collection[int] | None = None,
) -> Tensor:
    """Run with -inf at the keys that ``tokens`` of the chunks before ``chunk`` wrote, from that chunk's first call on.

    With ``calls``, ordinals of denoiser calls, only in those of them that are the chunk's. Keys are followed by
    value, layer by layer; see :class:`KeyTracker`. Raises SkipTest where that is impossible.
    """
    return run_with_weights(run, denoisers, chunk, dict.fromkeys(tokens, 0.0), per_frame, anchors, calls)


def run_with_weights(
    run: Callable[[], Tensor],
    denoisers: Sequence[Denoiser],
    chunk: int,
    weights: Mapping[int, float],
    per_frame: int,
    anchors: int,
    calls: Collection[int] | None = None,
) -> Tensor:
    """The same with log w, w by token, added to the scores of these keys, for every query."""
    trackers: dict[int, KeyTracker] = {}
    changed: set[int] = set()

    def edit(one: Attention) -> dict[int, float]:
        tracker = trackers.setdefault(one.layer, KeyTracker())
        tracker.see(one.rows)
        chunks = len(tracker.chunks)
        if chunks < chunk or (calls is not None and (chunks > chunk or one.call not in calls)):
            return {}
        changed.add(one.layer)
        written = {token: tracker.written_by(chunk, [token], per_frame, anchors) for token in weights}
        by_row = {row: weights[token] for token, rows in written.items() for row in rows}
        return {place: by_row[row] for place, row in enumerate(one.rows) if row in by_row}

    with watch_attention(denoisers, edit) as seen:
        result = run()
    require_followed(trackers, changed, seen, per_frame)
    return result


def require_followed(
    trackers: dict[int, KeyTracker], hidden: set[int], seen: Sequence[Attention], per_frame: int
) -> None:
    """Skip unless every layer with as many keys as a followed one was followed in whole frames."""
    if not seen:
        raise not_checked("the model does not call scaled_dot_product_attention")
    widths = {one.keys for one in seen if one.layer in hidden}
    missed = {one.layer for one in seen if one.keys in widths} - hidden
    ragged = [layer for layer in hidden for rows in trackers[layer].chunks if len(rows) % per_frame]
    if not hidden or missed or ragged:
        raise not_checked(
            "the keys of earlier chunks cannot be followed by value (the context is computed anew in every call, or "
            "several chunks are in flight); override reference() with a reference of your own"
        )
