"""The demo's sentences and its small table: what is better or worse, what is neither, what could not be measured."""

from types import SimpleNamespace

import pytest

from tokentrim_hooks.experiments.compare.settings import STANDARD
from tokentrim_hooks.experiments.compare.store import Outcome
from tokentrim_hooks.experiments.compare.table import number, percent, summarise
from tokentrim_hooks.experiments.compare.trials import Column, drift_columns, fault_columns
from tokentrim_hooks.experiments.demo.acts import MOVES
from tokentrim_hooks.experiments.demo.words import COLUMNS, sentences, table
from tokentrim_hooks.reference.fault import FAULTS

FAULT, DRIFT = fault_columns(15, FAULTS["context"]), drift_columns(20)
PAIRS = 8


def outcome(setting, columns, values, pruned):
    seeds = list(range(len(values)))
    return Outcome(
        setting=setting.name, description=setting.as_dict(), seeds=seeds, values={c.key: values for c in columns},
        judged=[10] * len(seeds), pruned=[pruned] * len(seeds), chunks=11, calls=55, extra=len(pruned),
        alone=[len(pruned)] * len(seeds), seconds=1.0,
    )  # fmt: skip


def act(name, columns, change, pruned=(), watch=None, pairs=PAIRS, other=None):
    base = [1.0 + 0.01 * i for i in range(pairs)]

    def moved(by):
        return [value + by * (1 + 0.1 * (i % 2)) for i, value in enumerate(base)]

    outcomes = [outcome(STANDARD[0], columns, base, []), outcome(STANDARD[1], columns, moved(change), list(pruned))]
    outcomes += [] if other is None else [outcome(MOVES, columns, moved(other), [])]
    rows = summarise(outcomes, columns, watch)
    return SimpleNamespace(name=name, trial=SimpleNamespace(columns=columns), rows=rows)


@pytest.fixture
def acts():
    return [act("fault", FAULT, -0.4, [8], watch=8), act("fading", DRIFT, 0.0)]


def test_what_drifts_is_told_by_figures_of_the_unpatched_model(acts):
    said = sentences(acts)[0]
    assert said.startswith("What drifts: unpatched, from chunks 1-10 to chunks 11-20, the ")
    both = "contrast goes from 1.04 to 1.04 and its share of sprites alive goes from 1.04 to 1.04"
    assert said.endswith(f"{both}. In the true video both are 1.")


def test_the_fault_is_told_with_its_interval_and_its_price(acts):
    said = sentences(acts)[1]
    assert "caught at once in 100.0 % of 8 videos" in said and "by -0.420 [-0.438, -0.402] from 1.035 (better)" in said
    assert said.endswith("The price: 1.8 % more denoiser calls, sprites alive (identity) -0.420 [-0.438, -0.402].")


def test_nothing_is_said_to_be_nothing(acts):
    said = sentences(acts)[2]
    assert "pruned 0.0 % of the chunks (fading); no measure got better or worse" in said
    assert "does not move slow drift" in said


def test_an_effect_on_slow_drift_would_be_told(acts):
    said = sentences([*acts, act("burning", DRIFT, -0.4, [3])])[2]
    assert "0.0 % of the chunks (fading) and 10.0 % of the chunks (burning)" in said
    assert "burning: background error -0.420 [-0.438, -0.402] (better)" in said
    assert "burning: sprites alive (identity) -0.420 [-0.438, -0.402] (worse)" in said and "does not move" not in said


def test_what_another_policy_did_is_told_beside_the_papers(acts):
    both = sentences([*acts, act("burning", DRIFT, 0.0, other=0.4)])
    assert "no measure got better or worse" in both[2], "the paper's did nothing"
    named = "Another policy, commit window 6 + row moments, on the burning model: "
    assert both[3].startswith(named) and "background error +0.420" in both[3]
    assert "sprites alive (identity) +0.420 [+0.402, +0.438] (better)" in both[3]
    neither = sentences([*acts, act("burning", DRIFT, 0.4, other=0.0)])
    assert "background error +0.420" in neither[2] and "(worse)" in neither[2]
    assert neither[3].endswith("on the burning model: no measure got better or worse over 8 videos.")


def test_the_table_names_a_policy_that_is_not_the_papers(acts):
    rows = table([*acts, act("burning", DRIFT, 0.0, other=0.4)])
    assert [row[0] for row in rows[8:]] == ["burning", "", "", "burning, commit window 6 + row moments", "", ""]


def test_few_videos_give_no_verdict():
    said = sentences([act("fault", FAULT, -0.4, [8], 8, pairs=5), act("fading", DRIFT, 0.0, pairs=5)])
    assert "(too few pairs)" in said[1] and "below 6 videos there is no verdict" in said[2]


def test_the_table_is_small_and_names_each_act_once(acts):
    rows = table(acts)
    assert len(rows) == 8 and all(len(row) == len(COLUMNS) for row in rows)
    assert rows[0] == ["fault", "error around the fault, +1", "1.035", "0.615", "-0.420", "[-0.438, -0.402]", "better"]
    assert [row[0] for row in rows] == ["fault", *[""] * 4, "fading", *[""] * 2]
    assert {row[-1] for row in rows[5:]} == {"no difference shown"}


def test_what_could_not_be_measured_is_a_dash(acts):
    last = table([acts[0], act("fading", DRIFT, float("nan"))])[-1]
    assert last[2:] == ["-", "-", "-", "no interval", "too few pairs"]


def test_rounding_never_hides_that_a_number_is_not_zero():
    assert [number(v, sign=True) for v in (0.0, 0.0004, -0.00002, 0.0005)] == ["+0.000", "+4e-04", "-2e-05", "+0.001"]
    assert (percent(0.125), percent(float("nan"))) == ("12.5 %", "-")


def test_a_column_has_a_name_per_window():
    assert (Column("m").key, Column("m", window="chunks 1-4").key) == ("m", "m @ chunks 1-4")
