"""The demo's sentences and its small table: what is better or worse, what is neither, what could not be measured."""

from types import SimpleNamespace

import pytest

from tokentrim_hooks.experiments.compare.settings import STANDARD
from tokentrim_hooks.experiments.compare.store import Outcome
from tokentrim_hooks.experiments.compare.table import number, percent, summarise
from tokentrim_hooks.experiments.compare.trials import Column, drift_columns, fault_columns
from tokentrim_hooks.experiments.demo.words import COLUMNS, sentences, table

FAULT, DRIFT = fault_columns(15), drift_columns(20)
PAIRS = 8


def outcome(setting, columns, values, pruned):
    seeds = list(range(len(values)))
    return Outcome(
        setting=setting.name, description=setting.as_dict(), seeds=seeds, values={c.key: values for c in columns},
        judged=[10] * len(seeds), pruned=[pruned] * len(seeds), chunks=11, calls=55, extra=len(pruned),
        alone=[len(pruned)] * len(seeds), seconds=1.0,
    )  # fmt: skip


def act(title, columns, change, pruned=(), watch=None, pairs=PAIRS):
    base = [1.0 + 0.01 * i for i in range(pairs)]
    changed = [value + change * (1 + 0.1 * (i % 2)) for i, value in enumerate(base)]
    outcomes = [outcome(STANDARD[0], columns, base, []), outcome(STANDARD[1], columns, changed, list(pruned))]
    rows = summarise(outcomes, columns, watch)
    return SimpleNamespace(title=title, trial=SimpleNamespace(columns=columns), rows=rows)


@pytest.fixture
def acts():
    return [act("A planted fault", FAULT, -0.4, [8], watch=8), act("Natural drift", DRIFT, 0.0)]


def test_the_fault_is_told_with_its_interval_and_its_price(acts):
    what, fault, _ = sentences(acts)
    assert "caught it at once in 100.0 % of 8 videos" in fault and "by -0.420 [-0.438, -0.402] from 1.035" in fault
    assert "one chunk later (better)" in fault
    assert "price: 1.8 % more denoiser calls, sprites alive (identity), chunks 12-15 -0.420" in fault
    assert "saturation error" not in fault, "what got better is no price"
    assert what.startswith("What drifts: ") and "from chunks 1-10 to chunks 11-20" in what


def test_nothing_is_said_to_be_nothing(acts):
    assert "pruned 0.0 % of the judged chunks; no measure better or worse" in sentences(acts)[2]


def test_an_effect_on_slow_drift_would_be_told(acts):
    slow = sentences([acts[0], act("Natural drift", DRIFT, -0.4, [3])])[2]
    assert "saturation error, chunks 11-20 better" in slow and "sprites alive (identity), chunks 11-20 worse" in slow


def test_few_videos_give_no_verdict():
    said = sentences([act("A planted fault", FAULT, -0.4, [8], 8, pairs=5), act("Natural drift", DRIFT, 0, pairs=5)])
    assert "(too few pairs)" in said[1] and "no verdict below 6 videos" in said[2]


def test_the_table_is_small_and_says_it_in_words(acts):
    rows = table(acts)
    assert len(rows) == 10 and all(len(row) == len(COLUMNS) for row in rows)
    assert rows[0][0] == "a planted fault: error around the fault, +1"
    assert rows[0][1:] == ["1.035", "0.615", "-0.420", "[-0.438, -0.402]", "better"]
    assert {row[-1] for row in rows[6:]} == {"no difference shown"}


def test_what_could_not_be_measured_is_a_dash(acts):
    last = table([acts[0], act("Natural drift", DRIFT, float("nan"))])[-1]
    assert last[1:] == ["-", "-", "-", "[-inf, +inf]", "too few pairs"]


def test_rounding_never_hides_that_a_number_is_not_zero():
    assert [number(v, sign=True) for v in (0.0, 0.0004, -0.00002, 0.0005)] == ["+0.000", "+4e-04", "-2e-05", "+0.001"]
    assert (percent(0.125), percent(float("nan"))) == ("12.5 %", "-")


def test_a_column_has_a_name_per_window():
    assert (Column("m").key, Column("m", window="chunks 1-4").key) == ("m", "m @ chunks 1-4")
