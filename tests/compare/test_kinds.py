"""``tokentrim compare`` over several kinds and with policies by name: controls, one page, what stays where it was."""

import dataclasses
import json
import re
from dataclasses import dataclass

import pytest
import torch
import toy_trial

from tokentrim_hooks.cli.main import main
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.compare import plugged, rollouts
from tokentrim_hooks.experiments.compare.page import render_kinds
from tokentrim_hooks.experiments.compare.plugged import BUILT_IN, KNOWN, of_policies
from tokentrim_hooks.experiments.compare.rollouts import graded, roll_out
from tokentrim_hooks.experiments.compare.settings import BASE, METHODS, STANDARD, Setting, changes, choose
from tokentrim_hooks.experiments.compare.store import Outcome
from tokentrim_hooks.experiments.compare.summary import NOTHING_WORSE, ONE_BATCH, Part, in_words, slower, texts
from tokentrim_hooks.experiments.compare.trials import Column, ReferenceMaker
from tokentrim_hooks.metrics.intervals import TOO_FEW
from tokentrim_hooks.plugins import make_policy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.built_in import tokentrim_policies
from tokentrim_hooks.policy.controls import ChooseTokens

OFF, GRADED = Setting(BASE, off=True), KNOWN[plugged.GRADED]
SEEDS = [7, 8]


def names(settings):
    return [setting.name for setting in settings]


@pytest.mark.parametrize("name", sorted(tokentrim_policies()))
def test_a_policys_name_means_that_policy_as_it_is_made_by_default(name):
    first, *controls = of_policies([name])
    assert first.policies(0) == [make_policy(name)] and not first.name.startswith("control")
    assert all(control.name.startswith("control: ") for control in controls)
    assert bool(controls) == (name != "observe"), "a policy that never prunes has nothing to be controlled"
    assert name in BUILT_IN or name == "observe"


def test_a_control_that_two_policies_share_is_run_once():
    chosen = of_policies(["adaptive", "commit-window", "row-moments", "latent-moments", "adaptive"])
    assert names(chosen) == [
        "adaptive", "control: adaptive random tokens", "commit window 6", "control: oldest window 6", "row moments",
        "control: graded afterwards", "latent moments",
    ]  # fmt: skip
    assert names(choose(["flowmo", "adaptive"], [], False, chosen[:2])) == [BASE, "flowmo", *names(chosen[:2])]


@dataclass(frozen=True)
class Judge(Policy):
    def judge(self, chunk, history):
        return None


@dataclass(frozen=True)
class JudgeAndHide(Judge):
    def hide(self, chunk, context):
        return None


@dataclass(frozen=True)
class Corrector(Policy):
    def correct(self, chunk):
        return None


@pytest.mark.parametrize(
    ("policy", "controls"),
    [(Judge(), ["control: theirs random tokens"]), (JudgeAndHide(), []), (Corrector(), ["control: graded afterwards"])],
)
def test_a_third_partys_policy_gets_the_control_that_its_hooks_have(policy, controls, monkeypatch):
    monkeypatch.setattr(plugged, "make_policy", lambda name: policy)
    first, *others = of_policies(["theirs"])
    assert (first.name, first.policies(0)) == ("theirs", [policy]) and names(others) == controls
    if isinstance(policy, Judge) and others:
        assert others[0].policies(0) == [ChooseTokens(policy=policy)]


def test_results_from_before_there_was_grading_go_on():
    assert [s.name for s in (*STANDARD, *METHODS) if "graded" in s.as_dict()] == [GRADED.name]
    assert changes(GRADED.as_dict()) == "not patched, graded afterwards" and changes(OFF.as_dict()) == "not patched"


def test_grading_gives_every_chunk_the_moments_of_the_first_and_feeds_nothing_back():
    trial = ReferenceMaker.load(4, None, sink=0, trained=False, device="cpu")(SEEDS)
    plain, take = roll_out(trial, OFF, SEEDS), roll_out(trial, GRADED, SEEDS)
    chunks = take.video.split(3, dim=1)
    assert torch.equal(chunks[0], plain.video[:, :3]) and len(chunks) == 5
    for made, was in zip(chunks[1:], plain.video.split(3, dim=1)[1:], strict=True):
        for pick in (torch.mean, torch.std):
            assert torch.allclose(pick(made, (1, 3, 4)), pick(chunks[0], (1, 3, 4)), atol=1e-4)
        one, two = made[0, :, 1].flatten(), was[0, :, 1].flatten()
        assert torch.corrcoef(torch.stack([one, two]))[0, 1] > 0.999, "one line per channel, drawn over the whole chunk"
    assert take.outcome.values == {k: v.tolist() for k, v in trial.measure(take.video).items()}
    assert (take.outcome.extra, take.outcome.judged, take.report) == (0, [0, 0], None)


def test_grading_takes_the_chunk_that_latent_moments_are_shown():
    shown = []

    @dataclass(frozen=True)
    class Look(Policy):
        def correct(self, chunk):
            shown.append(chunk.opening)

    trial = ReferenceMaker.load(3, None, sink=0, trained=False, device="cpu")([7])
    video = roll_out(trial, Setting("look", methods=(Look(),)), [7]).video
    assert all(torch.equal(opening, video[:, : trial.opening]) for opening in shown if opening is not None)
    assert any(opening is not None for opening in shown)


@pytest.mark.parametrize("opening", [None, 0, True, 2.0])
def test_a_trial_that_does_not_say_what_its_first_chunk_is_is_not_graded(opening, tmp_path, capsys):
    trial = toy_trial.make([1])
    if opening is not None:
        trial.opening = opening
    with pytest.raises(TokenTrimError, match="attribute `opening`"):
        graded(trial, torch.zeros(1, 4, 3, 2, 2))
    run = ["compare", "toy_trial:make", "--policies", "row-moments", "--seeds", "1", "--out", str(tmp_path / "x")]
    assert main(run) == 2 and "opening" in capsys.readouterr().err
    assert not (tmp_path / "x" / "results.jsonl").exists(), "refused before anything is computed"


IDENTITY, BACKGROUND, MOTION = "sprites alive (identity)", "background error", "motion error"


def outcome(setting, values, seconds, extra=0, seeds=6):
    found = {f"{name} @ {window}": [value + i for i in range(seeds)] for (name, window), value in values.items()}
    off = setting == BASE
    return Outcome(setting, {"off": off}, list(range(seeds)), found, [0] * seeds, [[]] * seeds, 5,
                   0 if off else 20, extra, [extra] * seeds, seconds)  # fmt: skip


class Three:
    columns = tuple(
        Column(name, aspect, better, window)
        for window in ("chunks 1-2", "chunks 3-4")
        for name, aspect, better in (
            (BACKGROUND, "stability", "lower"), (IDENTITY, "identity", "higher"), (MOTION, "motion", "lower"))
    )  # fmt: skip


def part(kind="burning", seeds=6, more=()):
    zero = {(c.name, c.window): 0.0 for c in Three.columns}
    helps = {**zero, (IDENTITY, "chunks 3-4"): 0.5, (MOTION, "chunks 1-2"): 0.25, (IDENTITY, "chunks 1-2"): -1.0}
    spared = {**zero, (BACKGROUND, "chunks 3-4"): -0.125}
    # Sign counts of six pairs do not reach 0.05 after adjustment: twelve do.
    made = [outcome(BASE, zero, 2.0, seeds=seeds), outcome("helps", helps, 3.0, 5, seeds), *more]
    return Part.of(kind, [*made, outcome("spared", spared, 1.0, 0, seeds)], Three, {"target": "reference"})


def test_a_row_says_effect_price_and_cost():
    seen = part(seeds=12)
    assert texts(seen, "helps") == [
        "+0.500 [+0.500, +0.500] **better**", "+0.000 [+0.000, +0.000]",
        "chunks 1-2: sprites alive (identity) -1.000 of 5.500, motion error +0.250 of 5.500",
        f"25.0 % more calls, {ONE_BATCH}",
    ]  # fmt: skip
    assert texts(seen, "spared")[1:] == [
        "-0.125 [-0.125, -0.125] **better**", NOTHING_WORSE, f"0.0 % more calls, {ONE_BATCH}",
    ]  # fmt: skip
    assert texts(seen, BASE) == ["5.500", "5.500", "", ONE_BATCH]
    told = dataclasses.replace(seen, slower={"helps": 1.5})
    assert texts(told, "helps")[3] == "25.0 % more calls, 1.50x the seconds"
    assert texts(part(seeds=3), "helps")[2] == TOO_FEW, "no verdict is no promise that nothing got worse"
    assert texts(seen, "of another kind") == ["-"] * 4


def test_seconds_are_compared_batch_by_batch_within_the_run():
    base = [Outcome(BASE, {}, [s], {}, [0], [[]], 1, 0, 0, [0], t) for s, t in ((1, 10.0), (2, 2.0), (3, 4.0))]
    ours = [Outcome("x", {}, [s], {}, [0], [[]], 1, 1, 0, [0], t) for s, t in ((1, 5.0), (2, 4.0), (3, 6.0), (9, 99.0))]
    assert slower([*base, *ours]) == {BASE: 1.0, "x": 1.75}, "median of 2 and 1.5: the first is cold, 9 has no partner"
    assert slower([base[0], ours[0]]) == {}, "one batch, and that one cold"


def test_the_page_and_the_table_hold_the_summary_first_and_then_each_kind():
    lone = outcome("<only here>", {(c.name, c.window): 0.0 for c in Three.columns}, 1.0, seeds=12)
    parts = [part("burning", 12), part("fading", 12, [lone])]
    text, page = in_words(parts), render_kinds(parts, {"helps": "much"})
    assert text.startswith("| setting | burning: late identity | burning: late background | burning: price | ")
    assert text.index("not across kinds") < text.index("## burning\n") < text.index("## fading\n")
    assert page.index('id="summary"') < page.index("<h2>burning</h2>") < page.index("<h2>fading</h2>")
    assert "&lt;only here&gt;" in page and "<only here>" not in page + text
    assert page.count("<td") > 0 and "one kind&#39;s tables" in page
    summary = page[page.index('id="summary"') : page.index("<h2>burning</h2>")]
    assert summary.count('class="better"') == 4 and summary.count("<svg") == 10 and "25.0 % more calls" in summary
    assert not re.findall(r"""(?:src|href)=|url\(|@import""", page), "the page must load nothing"


def command(out, kind, *more):
    return ["compare", "--reference", "--untrained", "--kind", kind, "--chunks", "2", "--seeds", "1", "--batch", "1",
            "--out", str(out), *more]  # fmt: skip


def test_one_run_over_two_kinds_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    run = command(tmp_path, "sink, burning,sink", "--policies", "row-moments", "--only", "self-caching")
    assert main(run) == 0
    text = capsys.readouterr().out
    assert text.index("sink  ") < text.index("burning  ") and "as of this machine" in " ".join(text.split())
    for kind in ("burning", "sink"):
        folder = tmp_path / kind
        assert json.loads((folder / "settings.json").read_text())["trial"]["kind"] == kind
        done = [json.loads(line)["setting"] for line in (folder / "results.jsonl").read_text().splitlines()]
        assert done == [BASE, "self-caching", "row moments", "control: graded afterwards"]
        assert (folder / "compare.html").is_file() and (folder / "table.md").is_file()
    page = (tmp_path / "compare.html").read_text()
    monkeypatch.setattr(rollouts, "outcome_of", lambda *given: pytest.fail("it is done already"))
    assert main(run) == 0 and (tmp_path / "compare.html").read_text() == page
    assert main(command(tmp_path, "fading")) == 2
    assert "holds a comparison of several kinds of drift; give another --out" in capsys.readouterr().err


@pytest.mark.parametrize("named", [["--reference", "burning,sink"], ["--reference", "--kind", "burning,sink"]])
def test_the_kinds_may_follow_reference(named, tmp_path):
    rest = ["--untrained", "--chunks", "2", "--seeds", "1", "--batch", "1", "--only", "", "--out", str(tmp_path)]
    assert main(["compare", *named, *rest]) == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["burning", "sink"]


def test_a_single_kind_stays_in_the_folder_itself_which_is_then_taken(tmp_path, capsys):
    assert main(command(tmp_path, "burning", "--only", "")) == 0
    assert {p.name for p in tmp_path.iterdir()} >= {"settings.json", "results.jsonl", "table.md", "compare.html"}
    capsys.readouterr()
    assert main(command(tmp_path, "all")) == 2
    assert "holds a comparison of one kind of drift; give another --out" in capsys.readouterr().err
    assert not (tmp_path / "fading").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "burning,melting"], "no kind of drift 'melting'; there are fading, burning, sink, framewise, all"),
        (["--reference", "burning,melting"], "no kind of drift 'melting'; there are fading, burning, sink, framewise"),
        (["--reference", "sink", "--kind", "sink"], "are given twice; give them to --reference or to --kind"),
        (["--kind", ","], "there are fading, burning, sink, framewise, all"),
        (["--policies", "adaptive,commit"], "no policy named 'commit'; did you mean 'commit-window'? installed: "),
    ],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_the_known_ones(arguments, words, tmp_path, capsys):
    assert main(["compare", "--reference", "--untrained", *arguments, "--out", str(tmp_path / "x")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_kinds_are_the_reference_models(tmp_path, capsys):
    assert main(["compare", "toy_trial:make", "--kind", "all", "--out", str(tmp_path / "x")]) == 2
    assert "give --reference, or one kind" in capsys.readouterr().err
