"""Nothing that we do to a chunk grows faster than what it is done to: counted in operations, never in seconds."""

import collections
from dataclasses import replace
from pathlib import Path

import growth
import pytest
from counting import Counter
from PIL import Image

import tokentrim_hooks as tokentrim
from tokentrim_hooks.experiments.bench.memory import Alive
from tokentrim_hooks.testing import ForcedPolicy

ROOT = Path(__file__).parents[2]
BASE = growth.Size(tokens=16, window=6, heads=1, width=8, dead=0.0, chunks=6)


def ops(chunks=6, **changes):
    """Operations that we add to a video of a blank model."""
    size = replace(BASE, chunks=chunks, **changes)
    generator = growth.blank(size)
    with Counter() as own:
        growth.seconds(generator, size)
    with Counter() as all_of_them, tokentrim.patched(generator, growth.policy_of(size)):
        growth.seconds(generator, size)
    return all_of_them.count - own.count


@pytest.mark.parametrize("changes", [{"tokens": 256}, {"layers": 9}, {"window": 30}])
def test_while_nothing_is_dead_no_size_adds_an_operation(changes):
    assert ops(**changes) == ops() > 0


@pytest.mark.parametrize("changes", [{"tokens": 256}, {"window": 30}, {"dead": 0.5}])
def test_with_something_dead_only_layers_add_operations(changes):
    base = {"dead": 0.1, "tokens": 64}
    # Which tokens drift is drawn at random, and a few operations depend on it; one for each token or frame would show.
    assert abs(ops(**{**base, **changes}) - ops(**base)) <= 16 < ops(**base) - ops()


def test_every_video_of_a_batch_adds_the_same():
    two, three, five = (ops(batch=batch) for batch in (2, 3, 5))
    assert five - three == 2 * (three - two) > 0


def test_every_layer_adds_the_same_with_something_dead():
    few, more, most = (ops(dead=0.1, layers=layers) for layers in (2, 4, 6))
    assert most - more == more - few > 0


@pytest.mark.parametrize("dead", (0.0, 0.1))
def test_a_long_video_adds_to_its_end_what_it_added_at_its_beginning(dead):
    short, long, longer = (ops(growth.EVERY * n, dead=dead, rolls=True) for n in (1, 2, 3))
    assert longer - long == long - short > 0


def test_slopes_and_exponents():
    for power in (1, 2):
        each, exponent = growth.slope([(x, 3 * x**power) for x in (1, 2, 4, 8)])
        assert exponent == pytest.approx(power) and (power == 2 or each == pytest.approx(3))
    assert growth.slope([(1, 5), (2, 5), (3, 5)]) == pytest.approx((0, 0))


def test_what_is_measured_prunes(monkeypatch):
    assert isinstance(growth.policy_of(replace(BASE, dead=0.1)), ForcedPolicy)
    monkeypatch.setattr(growth, "PANELS", {"tokens": ("tokens", (16, 64)), "dead": ("share", (0.1, 0.5))})
    monkeypatch.setattr(growth, "BIN", 2)
    found = growth.measure(BASE, 1, length=4)
    assert [x for x, _ in found["tokens"]["10 % dead"]] == [16, 64] and len(found["length"]["nothing dead"]) == 2
    assert growth.table(found).count("\n") == 2 + 5 - 1


def test_the_picture_is_shown_small_and_described():
    text = (ROOT / "docs" / "performance.md").read_text()
    alt = text.partition("](pictures/growth.png)")[0].rpartition("![")[2]
    assert len(alt.split()) >= 12, "what it shows, in words"
    assert 1000 < growth.PICTURE.stat().st_size < 60_000
    assert Image.open(growth.PICTURE).size[0] <= 900


class Named(Counter):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func.overloadpacket)] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def pruned(size):
    """A blank model and a policy that prunes it, its first prune proved."""
    generator = growth.blank(size)
    handle = tokentrim.patch(generator, growth.policy_of(size))
    growth.seconds(generator, size)
    return generator, handle


def test_which_rows_are_live_is_found_once_per_call_whatever_the_layers():
    found = []
    for layers in (2, 9):
        size = replace(BASE, dead=0.1, tokens=64, layers=layers)
        generator, _ = pruned(size)
        with Named() as counter:
            growth.seconds(generator, size)
        found.append((counter.names["aten.nonzero"], counter.names["aten.index_select"]))
    (few, gathers), (many, more) = found
    assert few == many > 0 and more - gathers == gathers // 2 * 7 > 0, "two gathers a layer, one index for all"


def test_what_is_gathered_is_of_one_layer_at_a_time():
    """At its peak a pruned video holds live K and V of one layer beside the cache, however many layers there are."""
    peaks = []
    for layers in (2, 9):
        size = replace(BASE, dead=0.1, tokens=256, heads=8, width=64, layers=layers)
        generator, handle = pruned(size)
        with Alive() as alive:
            growth.seconds(generator, size)
        handle.unpatch()
        with Alive() as plain:
            growth.seconds(generator, size)
        peaks.append(alive.peak - plain.peak)
    layer = 2 * size.window * size.tokens * size.heads * size.width * 4
    assert 0 < peaks[1] < 1.1 * layer and abs(peaks[1] - peaks[0]) < 0.1 * layer
