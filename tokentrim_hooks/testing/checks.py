"""The measuring instruments of the conformance kit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import SkipTest

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokentrim_hooks.adapter import Adapter
from tokentrim_hooks.inspection import bind
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.report.record import Report
from tokentrim_hooks.testing.attention import Attention, Denoiser, KeyTracker, around_calls, watch_attention


class Injected(Exception):
    """Raised by the kit in the middle of a model's call."""


def not_checked(reason: str) -> SkipTest:
    """The skip that says loudly that something was not checked."""
    return SkipTest(f"NOT CHECKED: {reason}")


@dataclass
class Counter:
    """Counts calls of :meth:`up`."""

    count: int = 0

    def up(self) -> None:
        """Count one more call."""
        self.count += 1


@contextmanager
def counting(denoisers: Sequence[Denoiser]) -> Iterator[Counter]:
    """Count the denoisers' calls in a block, replays included."""
    calls = Counter()
    with around_calls(denoisers, calls.up):
        yield calls


class Tripwire(TorchFunctionMode):
    """Counts linear layers (every model has them) as they run; raises Injected in the ``at``-th."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "linear":
            self.count += 1
            if self.count == self.at:
                raise Injected
        return func(*args, **(kwargs or {}))


def assert_raises(kind: type[BaseException], action: Callable[[], object]) -> None:
    """Assert that ``action`` raises ``kind``."""
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that the largest difference is at most ``tolerance`` times the largest expected value."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)}, {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "NaN or inf in the pruned run"
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"the pruned run is {error:.2e} away from its -inf reference (allowed {tolerance:.0e})"


def check_records(report: Report, chunks: int, overlap: int = 0, backwards: bool = False) -> None:
    """Assert that the first sample's records tell of ``chunks`` chunks of one video, in order.

    Each shares ``overlap`` latent frames with the one before, and lies behind it, or before it if ``backwards``.
    """
    records = [record for record in report if record.sample == 0]
    assert len(records) == chunks >= 5, f"{len(records)} chunks were recorded, the run has {chunks} (at least 5)"
    assert {record.video for record in records} == {0}, "one run was taken for several videos"
    assert [record.chunk for record in records] == list(range(chunks))
    for before, after in itertools.pairwise(records):
        adjoins = before.start - after.frames if backwards else before.start + before.frames
        expected = adjoins + (overlap if backwards else -overlap)
        assert after.start == expected, f"chunk {after.chunk} starts at frame {after.start}, expected {expected}"
    firsts = [record.phases.get("first", 0) for record in records]
    assert firsts == [1] * chunks, f"FIRST calls per chunk: {firsts}, expected one each"
    assert len({tuple(sorted(record.phases.items())) for record in records[1:-1]}) == 1, "phases vary by chunk"
    judged = [record.severity is not None for record in records]
    assert judged == [False] + [True] * (chunks - 1), f"judged chunks: {judged}"


def check_calls(report: Report, calls: int) -> None:
    """Assert that the first sample's records know each of the denoiser's calls, or each but for guidance's branches."""
    known = sum(sum(record.phases.values()) for record in report if record.sample == 0)
    assert known and calls % known == 0, f"{calls} denoiser calls, of which {known} were classified"


# ------------------------------------------------------------------------------------------------- kernels


def check_kernels(seen: Sequence[Attention], dead: int, held: int = 0) -> None:
    """Assert that the call replayed after a prune drops ``dead`` keys, of all samples, in every layer over the context.

    The call before the replay has the same arguments and nothing dead, so it tells how many keys there were. A layer
    may be launched once, or once for every set of samples that keep the same keys; space may be folded into its batch.
    ``held``: rows of history in the cache, of all samples, where known: a model may read less than these.
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
    assert all(n - m == dead for n, m in over), (
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
    trackers: dict[int, KeyTracker] = {}
    hidden: set[int] = set()

    def edit(one: Attention) -> list[int]:
        tracker = trackers.setdefault(one.layer, KeyTracker())
        tracker.see(one.rows)
        chunks = len(tracker.chunks)
        if chunks < chunk or (calls is not None and (chunks > chunk or one.call not in calls)):
            return []
        dead = tracker.written_by(chunk, tokens, per_frame, anchors)
        hidden.add(one.layer)
        return [place for place, row in enumerate(one.rows) if row in dead]

    with watch_attention(denoisers, edit) as seen:
        result = run()
    require_followed(trackers, hidden, seen, per_frame)
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


# ------------------------------------------------------------------------------------------------- disturbances


@dataclass
class PoisonLog:
    """How many dead rows were overwritten with NaN, all layers and calls together."""

    rows: int = 0


@contextmanager
def poisoned(denoisers: Sequence[Denoiser], adapter: Adapter[Any]) -> Iterator[PoisonLog]:
    """Before every call, fill the marked rows of V (known by a first element that is not finite) with NaN."""
    log = PoisonLog()

    def fill(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = adapter.parse(bind(module, args, kwargs))
        context = adapter.context(call) if call is not None else None
        for values in context.values if isinstance(context, CacheRows) else ():
            marks = values[..., 0, 0].clone()
            dead = ~torch.isfinite(marks.float())
            log.rows += int(dead.sum())
            values[dead] = float("nan")
            values[..., 0, 0] = marks

    with ExitStack() as undo:
        for module in denoisers:
            if isinstance(module, nn.Module):
                undo.callback(module.register_forward_pre_hook(fill, with_kwargs=True, prepend=True).remove)
        yield log


@contextmanager
def replaced_forward(module: nn.Module) -> Iterator[None]:
    """Put a wrapper in the place of ``forward`` on the instance, as accelerate's ``add_hook_to_module`` does."""
    original = module.forward

    def new_forward(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), original)
    try:
        yield
    finally:
        vars(module).pop("forward", None)


def failures(kit: type[Any], only: Collection[str] = ()) -> dict[str, str]:
    """Run a conformance class (or ``only`` some tests of it) without pytest.

    Returns:
        What failed and why, by the name of the test; and what could not be checked, whose reason begins with
        ``NOT CHECKED``. Only what passed is not in it.
    """
    found = {}
    for name in sorted(only or (name for name in dir(kit) if name.startswith("test_"))):
        try:
            getattr(kit(), name)()
        except SkipTest as open_question:
            found[name] = str(open_question)
        except Exception as failure:
            found[name] = f"{type(failure).__name__}: {failure}"
    return found
