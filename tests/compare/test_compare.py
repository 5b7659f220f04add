"""``tokentrim compare``: pairing, resuming, guarding, tables. Tiny random models."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import toy_trial

from tokentrim_hooks.cli.main import main
from tokentrim_hooks.errors import ReportError, TokenTrimError
from tokentrim_hooks.experiments.compare.page import render
from tokentrim_hooks.experiments.compare.rollouts import batches, compare, outcome_of
from tokentrim_hooks.experiments.compare.settings import BASE, STANDARD, Setting, choose, parse_setting
from tokentrim_hooks.experiments.compare.store import Outcome, Store
from tokentrim_hooks.experiments.compare.table import markdown, summarise, terminal
from tokentrim_hooks.experiments.compare.trials import Column, ReferenceMaker
from tokentrim_hooks.policy.controls import AlwaysPolicy, ChooseTokens, FreshNoise
from tokentrim_hooks.policy.token_trim import DriftPolicy

OFF, ALWAYS = Setting(BASE, off=True), Setting("always", always=True)
AGAIN = Setting("again", always=True, tokens="none")


def test_standard_settings_hold_the_grid_and_the_controls():
    described = {s.name: s for s in STANDARD}
    assert described["off"].off and described["paper first-step"].policy(0) == DriftPolicy()
    assert {s.options.fraction for s in STANDARD} == {0.05, 0.1, 0.2}
    assert {s.options.sensitivity for s in STANDARD} == {1.0, 2.0, 3.0}
    assert described["control: random tokens"].policy(5) == ChooseTokens(DriftPolicy(), "random", 5)
    assert described["control: new noise only"].policy(5) == FreshNoise(ChooseTokens(DriftPolicy(), "none", 5), 5)
    assert described["prune always"].policy(0) == AlwaysPolicy()
    assert "anchors pruned" not in [s.name for s in choose(None, [], anchors=False)]
    assert [s.name for s in choose(["p 0.2"], ["x: sensitivity=1"], anchors=False)] == ["off", "p 0.2", "x"]


def test_settings_are_read_from_words():
    setting = parse_setting("mine: fraction=0.3, probe=candidate, persist=false, tokens=least, warmup=4")
    options = DriftPolicy(fraction=0.3, persist=False, warmup=4)
    assert setting == Setting("mine", probe="candidate", tokens="least", options=options)
    for text in ("x: colour=red", "x: persist=maybe", "x: probe=none", "x: fraction=2", "x: warmup=two"):
        with pytest.raises(TokenTrimError, match="setting"):
            parse_setting(text)
    for text in ("mine fraction=0.9", "fraction=0.9", ": fraction=0.9", ""):
        with pytest.raises(TokenTrimError, match="has no name with a colon"):
            parse_setting(text)


def test_arms_share_their_noise_and_a_null_control_changes_nothing(tmp_path):
    store = Store(tmp_path, {})
    compare(toy_trial.make, [OFF, AGAIN, ALWAYS], batches([3, 4, 5], 2), store)
    off, again, always = (
        {seed: o.values["brightness"][i] for o in store.outcomes if o.setting == name for i, seed in enumerate(o.seeds)}
        for name in ("off", "again", "always")
    )
    assert off == again and off.keys() == {3, 4, 5}
    assert all(off[seed] != always[seed] for seed in off)
    assert [o.pruned for o in store.outcomes if o.setting == "again"] == [[[3, 4, 5]] * 2, [[3, 4, 5]]]
    rows = {row.setting: row for row in summarise(store.outcomes, toy_trial.Toy.columns)}
    difference = rows["always"].differences["brightness"]
    assert difference.pairs == 3
    assert difference.mean == pytest.approx(sum(always[s] - off[s] for s in off) / 3)
    assert rows["always"].pruned == pytest.approx(3 / 5)  # chunks 1 to 5 are judged, 3 to 5 pruned
    assert rows["always"].extra == pytest.approx(3 / (6 * 5))  # four steps and a clean call per chunk
    same = rows["again"].differences["brightness"]
    assert (same.low, same.high, same.p) == (0, 0, 1)


def test_global_random_state_is_left_alone():
    trial = toy_trial.make([1])
    before = torch.get_rng_state()
    outcome_of(trial, ALWAYS, [1])
    assert torch.equal(before, torch.get_rng_state())


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    store = Store(tmp_path, {"a": 1})
    compare(toy_trial.make, [OFF], [[1, 2]], store)
    log = tmp_path / "results.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + whole[: len(whole) // 2])  # killed while writing
    toy_trial.MADE.clear()
    again = Store(tmp_path, {"a": 1})
    compare(toy_trial.make, [OFF, ALWAYS], [[1, 2], [3]], again)
    assert toy_trial.MADE == [[1, 2], [3]]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["setting"], line["seeds"]) for line in lines] == [
        ("off", [1, 2]), ("always", [1, 2]), ("off", [3]), ("always", [3]),
    ]  # fmt: skip
    assert log.read_bytes().startswith(whole)
    toy_trial.MADE.clear()
    compare(toy_trial.make, [OFF, ALWAYS], [[1, 2], [3]], Store(tmp_path, {"a": 1}))
    assert toy_trial.MADE == []


def test_another_comparison_s_folder_is_refused_by_what_differs(tmp_path):
    made = {"columns": [{"name": "x" * 300}], "trial": {"chunks": 8, "kind": "fading"}, "target": "reference"}
    Store(tmp_path, made)
    with pytest.raises(TokenTrimError) as caught:
        Store(tmp_path, {**made, "columns": [{"name": "y"}], "trial": {"chunks": 24, "kind": "fading"}})
    words = "holds another comparison: chunks 8 then, 24 now.\nGive another --out."
    assert str(caught.value) == f"{tmp_path} {words}"
    with pytest.raises(TokenTrimError, match=r"holds another comparison: other columns\.\n"):
        Store(tmp_path, {**made, "columns": []})
    Store(tmp_path, made)


HOLD = """
import sys, time
from pathlib import Path
from tokentrim_hooks.experiments.compare.store import Store
store = Store(Path(sys.argv[1]), {"a": 1})
with store.held():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_two_comparisons_at_once_in_one_folder_are_refused_and_nothing_is_cut(tmp_path):
    store = Store(tmp_path, {"a": 1})
    compare(toy_trial.make, [OFF], [[1]], store)
    half = '{"setting": "off", "se'
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (tmp_path / "results.jsonl").open("a") as file:
            file.write(half)  # as if the other were amid a line
        for act in (lambda: Store(tmp_path, {"a": 1}), lambda: compare(toy_trial.make, [OFF, ALWAYS], [[1]], store)):
            with pytest.raises(TokenTrimError, match=r"another comparison is running in .*\n.*another --out"):
                act()
        assert (tmp_path / "results.jsonl").read_text().endswith(half)
    finally:
        other.communicate("")
    compare(toy_trial.make, [OFF, ALWAYS], [[1]], Store(tmp_path, {"a": 1}))
    assert [o.setting for o in Store(tmp_path, {"a": 1}).outcomes] == ["off", "always"], "its end, or death, frees it"


def test_what_another_has_added_since_is_not_done_again(tmp_path):
    early, late = Store(tmp_path, {}), Store(tmp_path, {})
    compare(toy_trial.make, [OFF], [[1, 2]], early)
    toy_trial.MADE.clear()
    compare(toy_trial.make, [OFF], [[1, 2]], late)
    assert toy_trial.MADE == [] and len(late.outcomes) == 1


def test_results_of_different_runs_are_not_mixed(tmp_path):
    store = Store(tmp_path, {"chunks": 4})
    compare(toy_trial.make, [OFF, ALWAYS], [[1]], store)
    with pytest.raises(TokenTrimError, match=r"chunks 4 then, 5 now"):
        Store(tmp_path, {"chunks": 5})
    with pytest.raises(TokenTrimError, match="another setting named 'always'"):
        Store(tmp_path, {"chunks": 4}, [Setting("always", always=True, options=DriftPolicy(fraction=0.5))])
    (tmp_path / "settings.json").unlink()
    with pytest.raises(TokenTrimError, match=r"no settings\.json"):
        Store(tmp_path, {"chunks": 4})


def test_a_broken_log_or_measure_is_named(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "results.jsonl").write_text('{"setting": "off"}\n')
    with pytest.raises(ReportError, match=r"results\.jsonl:1"):
        Store(tmp_path, {})
    with pytest.raises(TokenTrimError, match="1 values of 'brightness' for 2 seeds"):
        outcome_of(toy_trial.wrong([1, 2]), OFF, [1, 2])


def outcome(setting, seeds, values, pruned=()):
    return Outcome(setting, {}, seeds, {"m": values}, [4] * len(seeds), [list(pruned)] * len(seeds), 5, 20, 2,
                   [len(pruned)] * len(seeds), 1.0)  # fmt: skip


def test_tables_say_what_is_better_and_what_has_too_few_pairs():
    columns = [Column("m", "motion", "lower")]
    seeds = [1, 2, 3, 4, 5, 6]
    made = [
        outcome("off", seeds, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        outcome("good", seeds[::-1], [5.5, 4.5, 3.5, 2.5, 1.5, 0.5], [2]),  # paired by seed, not by place
        outcome("same", seeds, [0.0, 3.0, 2.0, 5.0, 4.0, 7.0]),
        outcome("few", seeds[:3], [0.0, 3.0, float("nan")]),
    ]
    rows = summarise(made, columns, watch=2)
    text = markdown(rows, columns, watch=2)
    # Six equal differences have p = 2 / 64, but two comparisons stand in the table: 4 / 64 is no verdict.
    assert "| good | 6 | 25.0 % | 5.0 % | 100.0 % | -0.500 [-0.500, -0.500] |" in text
    assert "| same | 6 | 0.0 % | 0.0 % | 0.0 % | +0.000 [-1.150, +1.150] |" in text
    assert "| few | 3 | 0.0 % | 0.0 % | 0.0 % | +0.000 [-12.706, +12.706] (too few pairs) |" in text
    assert "| off | 6 |" in text and " 3.500 |" in text
    alone = summarise([made[0], made[1], made[3]], columns, watch=2)
    assert "| -0.500 [-0.500, -0.500] **better** |" in markdown(alone, columns, watch=2)
    [(heads, lines)] = terminal(alone, columns, watch=2)
    assert heads == ["", "motion"]
    assert [text.split("\n")[-2] for _, text in lines] == ["m", "3.500", "better", "too few pairs"]
    page = render(alone, columns, {}, watch=2)
    assert page.count('<td class="better">') == 1 and page.count("<small>too few pairs</small>") == 1
    with pytest.raises(ReportError, match="'off'"):
        summarise(made[1:], columns)


def test_command_on_a_users_function(tmp_path, capsys):
    run = ["compare", "toy_trial:make", "--out", str(tmp_path), "--seeds", "2", "--batch", "2", "--only", "",
           "--setting", "all <of> it: always=true"]  # fmt: skip
    assert main(run) == 0
    text = capsys.readouterr().out
    assert "stability" in text and "motion" in text
    page = (tmp_path / "compare.html").read_text()
    assert "all &lt;of&gt; it" in page and "<svg" in page and "viewport" in page
    assert not re.findall(r"""(?:src|href)=|url\(|@import""", page), "the page must load nothing"
    assert (tmp_path / "table.md").read_text().count("all &lt;of> it") == 1
    assert json.loads((tmp_path / "settings.json").read_text())["trial"] == {"toy": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either"),
        (["--reference", "x:y"], "no kind of drift 'x:y'; there are fading"),
        (["--reference", "--untrained", "--only", "nonsense"], "no such setting"),
        (["--reference", "--untrained", "--fault", "chunk", "--chunks", "5"], "at least 8 chunks"),
        (["no_such_module_anywhere:make"], "cannot import"),
    ],
)
def test_wrong_use_is_explained(arguments, words, tmp_path, capsys):
    assert main(["compare", *arguments, "--out", str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("fault", [None, "context"])
def test_reference_trial_measures_every_column_and_each_seed_is_its_own(fault):
    maker = ReferenceMaker.load(9, fault, sink=0, trained=False, device="cpu")
    pair, single = maker([7, 8]), maker([8])
    assert torch.equal(pair.scene.video[1:], single.scene.video)
    assert torch.equal(pair.blotch.corner[1:], single.blotch.corner)
    result = outcome_of(pair, OFF, [7, 8])
    assert list(result.values) == [column.key for column in pair.columns]
    assert {c.aspect for c in pair.columns} == {"stability", "identity", "motion"}
    names = {"", "chunks 8-8", "chunks 9-9"} if fault else {"chunks 1-4", "chunks 5-9"}
    assert {c.window for c in pair.columns} == names
    assert pair.watch == (8 if fault else None)
    assert all(len(column) == 2 for column in result.values.values())
