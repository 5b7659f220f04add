"""A log answers what another setting would have pruned: exactly where it can, in words where it cannot."""

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokentrim_hooks as tokentrim
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.what_if.answers import SENSITIVITIES, ask, question, row, section, usual
from tokentrim_hooks.experiments.what_if.replay import Replay, of_the_run
from tokentrim_hooks.policy.controls import ChooseTokens
from tokentrim_hooks.policy.drift import RunningStatistics
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.report.record import ChunkRecord, read_report, stream


def rolled_out(folder, policy, seed=1, chunks=8, batch=1, grid=(2, 3)):
    """The log of a run of a small random model; its chunks differ enough for all decisions to occur."""
    pipeline = ReferencePipeline.random(grid=grid)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 3 * chunks, 3, 4 * grid[0], 4 * grid[1], generator=generator)
    noise *= 1 + torch.rand(batch, 3 * chunks, 1, 1, 1, generator=generator)
    torch.manual_seed(seed)
    with torch.no_grad(), tokentrim.patched(pipeline, policy, observers=[tokentrim.JsonLines(folder)]):
        pipeline.inference(noise)
    return read_report(folder)


policies = st.builds(
    tokentrim.DriftPolicy,
    fraction=st.sampled_from([0.05, 0.1, 0.34, 0.5, 1.0]),
    sensitivity=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    warmup=st.integers(0, 4),
    max_regenerations=st.integers(0, 2),
    persist=st.booleans(),
)


@given(policies, st.integers(0, 10_000), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_the_setting_that_ran_decides_again_as_it_did(tmp_path_factory, policy, seed, batch):
    report = rolled_out(tmp_path_factory.mktemp("run"), policy, seed, batch=batch)
    assert of_the_run(report.settings) == policy
    replay = Replay(policy, same=True)
    for record in report:
        samples = replay._samples.get((record.video, record.sample))
        before = samples.statistics if samples else RunningStatistics.empty(1)
        verdict = replay.feed(record)
        assert (verdict is None) == (record.severity is None)
        if verdict is not None:
            assert float(verdict.severity[0]) == record.severity
            assert bool(verdict.prune[0]) * (policy.max_regenerations > 0) == record.pruned
            if record.threshold is not None:
                found = (float(before.mean[0]), float(before.std[0]), float(verdict.threshold[0]))
                assert found == (record.mean, record.std, record.threshold), "to the last bit"
    assert replay.agreed == replay.judged == replay.sure == sum(r.severity is not None for r in report)
    assert replay.first is None and replay.pruned == report.triggers


ADAPTIVE = tokentrim.AdaptivePolicy(sensitivity=0.5, floor=0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regenerations", [0, 1, 2])
def test_adaptive_policy_decides_again_as_it_did_by_its_own_log(tmp_path, regenerations, seed):
    ran = dataclasses.replace(ADAPTIVE, max_regenerations=regenerations)
    report = rolled_out(tmp_path, ran, seed, chunks=12, batch=2)
    assert of_the_run(report.settings) == ran
    (replay,) = ask(report, report.settings, [])
    assert replay.same and replay.agreed == replay.judged == 22 and replay.pruned == report.triggers
    thresholds = {(r.video, r.sample, r.chunk): r.threshold for r in report if r.threshold is not None}
    again = Replay(ran, same=True)
    for record in report:
        verdict, place = again.feed(record), (record.video, record.sample, record.chunk)
        if verdict is not None:
            assert float(verdict.severity[0]) == record.severity, "to the last bit"
            assert thresholds.get(place, math.inf) == pytest.approx(float(verdict.threshold[0]), rel=1e-12)


def test_a_run_that_watched_with_adaptive_policy_says_what_it_would_have_pruned(tmp_path):
    watched = rolled_out(tmp_path / "a", dataclasses.replace(ADAPTIVE, max_regenerations=0), chunks=12)
    pruned = rolled_out(tmp_path / "b", ADAPTIVE, chunks=12)
    (replay,) = [r for r in ask(watched, watched.settings, [ADAPTIVE]) if r.policy == ADAPTIVE]
    first = next(r.chunk for r in pruned if r.pruned)
    assert not watched.triggers and replay.same and replay.first == (0, 0, first) == replay.named[0]
    asked = usual(watched.settings)
    assert [p.sensitivity for p in asked if isinstance(p, tokentrim.AdaptivePolicy)] == [1.5, *SENSITIVITIES]
    counts = [r.pruned for r in ask(watched, watched.settings, asked[1:-1]) if r.policy.max_regenerations]
    assert counts == sorted(counts, reverse=True) and counts[0] > 0
    other = dataclasses.replace(ADAPTIVE, reach=2)
    assert "latents" in ask(watched, watched.settings, [other])[-1].lacks
    assert not ask(watched, watched.settings, [tokentrim.DriftPolicy()])[-1].lacks


WATCHED = [tokentrim.ObservePolicy(), tokentrim.DriftPolicy(sensitivity=0.5), tokentrim.DriftPolicy(sensitivity=99.0)]


@pytest.mark.parametrize("acting", WATCHED, ids=["observe", "prunes", "does not prune"])
@given(st.integers(0, 10_000), st.integers(1, 2))
@settings(deadline=None, max_examples=8)
def test_a_policy_that_watched_answers_from_another_ones_log(tmp_path_factory, acting, seed, batch):
    """Against a run of its own: exact until either prunes, for from there on the videos are two."""
    watched = rolled_out(tmp_path_factory.mktemp("w"), tokentrim.Watched(acting, watcher=ADAPTIVE), seed, 12, batch)
    alone = rolled_out(tmp_path_factory.mktemp("a"), acting, seed, 12, batch)
    own = rolled_out(tmp_path_factory.mktemp("o"), ADAPTIVE, seed, 12, batch)
    assert [(r.severity, r.threshold, r.pruned, r.tokens) for r in watched] == [
        (r.severity, r.threshold, r.pruned, r.tokens) for r in alone
    ], "it changes nothing"
    assert watched.settings["policy"] == type(acting).__name__ and of_the_run(watched.settings) == acting
    (replay,) = [r for r in ask(watched, watched.settings, [ADAPTIVE]) if r.policy == ADAPTIVE]
    assert replay.same and replay.judged == 11 * batch
    # One prune makes another video of every sample that shares the random stream, so the earliest one counts.
    first = min((r.chunk for r in (*watched, *own) if r.pruned), default=99)
    together = [(r, o) for r, o in zip(watched, own, strict=True) if r.severity is not None and r.chunk <= first]
    assert together and all(r.watched == pytest.approx(o.severity, rel=1e-6) for r, o in together)
    mine = {r.chunk for r in own if r.pruned and r.chunk <= first}
    assert {chunk for _, _, chunk in replay.named if chunk <= first} == mine


def test_the_watcher_prunes_in_some_of_the_runs_above(tmp_path):
    report = rolled_out(tmp_path, tokentrim.Watched(tokentrim.ObservePolicy(), watcher=ADAPTIVE), chunks=12, batch=2)
    assert ask(report, report.settings, [ADAPTIVE])[-1].pruned > 0


def test_who_watches_judges_with_the_options_that_it_watched_with(tmp_path):
    report = rolled_out(tmp_path, tokentrim.Watched(tokentrim.DriftPolicy()))
    assert all(record.watched is not None for record in report if record.severity is not None)
    assert not ask(report, report.settings, [tokentrim.AdaptivePolicy(sensitivity=3.0)])[-1].lacks
    assert "latents" in ask(report, report.settings, [tokentrim.AdaptivePolicy(fraction=0.5)])[-1].lacks
    with pytest.raises(ValueError, match="judges nothing"):
        tokentrim.Watched(watcher=tokentrim.CommitWindow())


def test_the_law_above_sees_prunes_and_none(tmp_path):
    reports = [rolled_out(tmp_path / str(s), tokentrim.DriftPolicy(sensitivity=s), batch=3) for s in (0.0, 0.5, 9.0)]
    triggers = [report.triggers for report in reports]
    assert triggers[0] > triggers[1] > triggers[2] == 0


@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 1.5, 3.0]), st.integers(0, 3))
@settings(deadline=None, max_examples=15)
def test_up_to_its_first_other_decision_the_answer_is_what_a_run_gives(tmp_path_factory, seed, sensitivity, warmup):
    """Asked of a run that only watched, against a run with the policy itself: exact through the first prune."""
    policy = tokentrim.DriftPolicy(sensitivity=sensitivity, warmup=warmup)
    watched = rolled_out(tmp_path_factory.mktemp("watched"), tokentrim.ObservePolicy(), seed)
    pruned = rolled_out(tmp_path_factory.mktemp("pruned"), policy, seed)
    (replay,) = [r for r in ask(watched, watched.settings, [policy]) if r.policy == policy]
    first = next((r.chunk for r in pruned if r.pruned), None)
    assert (replay.first[2] if replay.first else None) == first
    judged = [r.chunk for r in pruned if r.severity is not None]
    assert replay.sure == sum(first is None or chunk <= first for chunk in judged)


def test_a_lower_sensitivity_prunes_no_less_of_a_run_that_was_watched(tmp_path):
    report = rolled_out(tmp_path, tokentrim.ObservePolicy(), chunks=20, batch=2)
    replays = {r.policy.sensitivity: r for r in ask(report, report.settings, usual(report.settings)[:-1])}
    counts = [replays[value].pruned for value in SENSITIVITIES]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_another_fraction_is_asked_of_the_drift_of_all_tokens(tmp_path):
    policy = tokentrim.DriftPolicy(fraction=0.5, sensitivity=1.0)
    report = rolled_out(tmp_path, tokentrim.ObservePolicy(fraction=0.2), chunks=12, grid=(3, 4))
    (replay,) = [r for r in ask(report, report.settings, [policy]) if r.policy == policy]
    assert not replay.same and "four digits" in row(replay)[-1] and row(replay)[3] == "no"
    statistics, expected = RunningStatistics.empty(1), []
    for record in (r for r in report if r.severity is not None):
        severity = sum(sorted(record.drift, reverse=True)[:6]) / 6
        limit = float(statistics.mean[0] + statistics.std[0]) if statistics.count >= 2 else math.inf
        expected += [record.chunk] if severity > limit else []
        statistics = statistics.updated(torch.tensor([severity], dtype=torch.float64))
    assert [chunk for _, _, chunk in replay.named] == expected and replay.judged == 11


def test_a_policy_that_reads_latents_is_answered_in_words(tmp_path):
    report = rolled_out(tmp_path, tokentrim.DriftPolicy())
    replay = ask(report, report.settings, [tokentrim.AdaptivePolicy()])[-1]
    assert "latents" in replay.lacks and replay.judged == 0
    assert row(replay)[1] == "not known" and "The log does not say: it reads the latents of chunks" in row(replay)[-1]


@pytest.mark.parametrize("name", ["prediction", "summary", "previous", "first"])
@pytest.mark.parametrize(
    "use",
    [lambda x: x.mean(), lambda x: x.shape, lambda x: torch.norm(x), lambda x: 1.0 - torch.ones(1) * x, lambda x: x[0],
     lambda x: torch.cdist(x, x), lambda x: len(x), lambda x: -x, lambda x: x + 1],
)  # fmt: skip
def test_whatever_a_policy_does_with_latents_it_hears_that_there_are_none(name, use):
    @dataclass(frozen=True)
    class Curious(tokentrim.Policy):
        def judge(self, chunk, history):
            return use(getattr(chunk, name))

    replay = Replay(Curious(), same=False)
    replay.feed(ChunkRecord(0, 1, 0, 3, 3, {}, severity=1.0, drift=(1.0, 2.0), grid=(1, 2)))
    assert "latents" in replay.lacks


def test_a_policy_of_drift_and_history_alone_is_answered(tmp_path):
    @dataclass(frozen=True)
    class Worst(tokentrim.Policy):
        limit: float = 0.0

        def judge(self, chunk, history):
            severity, token = chunk.drift.max(dim=-1)
            return tokentrim.Verdict(token[:, None], severity, severity * 0 + self.limit, severity > self.limit)

    report = rolled_out(tmp_path, tokentrim.ObservePolicy())
    worst = sorted(max(r.drift) for r in report if r.severity is not None)
    replay = ask(report, report.settings, [Worst(limit=worst[3])])[-1]
    assert replay.pruned == len(worst) - 4 and not replay.lacks


def test_a_report_that_has_let_go_of_drift_says_so(tmp_path):
    report = rolled_out(tmp_path, tokentrim.DriftPolicy())
    short = [dataclasses.replace(record, drift=()) for record in report]
    replays = ask(short, report.settings, [tokentrim.DriftPolicy(fraction=0.5), tokentrim.DriftPolicy(sensitivity=1.0)])
    assert "drift of every token" in replays[1].lacks and not replays[2].lacks


def test_statistics_begin_anew_where_the_runs_did():
    def record(chunk, severity, mean):
        return ChunkRecord(0, chunk, 0, 3 * chunk, 3, {}, severity=severity, accepted_severity=severity, mean=mean)

    replay = Replay(tokentrim.DriftPolicy(warmup=1, sensitivity=1.0), same=True)
    for one in [record(1, 9.0, None), record(2, 9.0, 9.0), record(3, 1.0, None), record(4, 5.0, 1.0)]:
        replay.feed(one)
    assert [chunk for _, _, chunk in replay.named] == [4], "a switch of scenes at chunk 3: 5 is above 1, not above 9"


def test_a_log_without_its_beginning_is_left_out_and_said():
    replay = Replay(tokentrim.DriftPolicy(), same=True)
    replay.feed(ChunkRecord(0, 7, 0, 21, 3, {}, severity=1.0, accepted_severity=1.0, mean=2.0))
    assert (replay.lost, replay.judged) == (1, 0) and row(replay)[1] == "not known"


def test_questions_in_words():
    ran = tokentrim.DriftPolicy(fraction=0.3, warmup=5)
    assert question("sensitivity=1.5", ran) == dataclasses.replace(ran, sensitivity=1.5)
    assert question("drift: fraction=0.2, persist=false") == tokentrim.DriftPolicy(fraction=0.2, persist=False)
    assert question("adaptive: sensitivity=3") == tokentrim.AdaptivePolicy(sensitivity=3)
    assert question("adaptive") == tokentrim.AdaptivePolicy()
    for wrong in ("fraction=2", "colour=1", "fraction", "nobody: x=1", "drift: fraction", "fraction=x"):
        with pytest.raises(TokenTrimError):
            question(wrong)


@pytest.mark.parametrize(
    "given",
    [{}, {"policy": 7}, {"policy": "DriftPolicy", "policy.fraction": "x"},
     {"policy": "DriftPolicy", "policy.warmup": []}, {"policy": ["DriftPolicy"]},
     {"policy": None, "policy.policy": [1]}],
)  # fmt: skip
def test_settings_of_a_log_may_be_anything(given):
    records = [ChunkRecord(0, i, 0, 3 * i, 3, {}, severity=1.0, drift=(1.0, 2.0), grid=(1, 2)) for i in range(3)]
    assert all(row(replay) for replay in ask(records, given, usual(given)))


def test_a_wrapped_policy_is_known_by_what_it_wraps(tmp_path):
    inner = tokentrim.DriftPolicy(sensitivity=0.5)
    report = rolled_out(tmp_path, ChooseTokens(inner, "least"))
    assert of_the_run(report.settings) == inner
    replay = ask(report, report.settings, [])[0]
    assert replay.agreed == replay.judged and replay.pruned == report.triggers > 0


def test_the_page_has_the_table_and_its_first_row_is_the_run(tmp_path):
    from tokentrim_hooks.report.page import write_page

    report = rolled_out(tmp_path, tokentrim.DriftPolicy(sensitivity=0.5), batch=2)
    table = section(tmp_path, ["fraction=0.5"])
    judged = sum(r.severity is not None for r in report)
    all_of_them = f"{judged} of {judged}"
    assert table.rows[0][:2] == ["DriftPolicy(sensitivity=0.5)", f"{report.triggers} of {judged}"]
    assert table.rows[0][2:4] == [all_of_them, all_of_them]
    assert len(table.rows) == 1 + len(SENSITIVITIES) + 2
    html = write_page(tmp_path, sections=[table]).read_text()
    assert '<a href="#what-if">' in html and "AdaptivePolicy()</th><td>not known" in html


def test_a_log_is_asked_while_it_is_read(tmp_path, monkeypatch):
    rolled_out(tmp_path, tokentrim.DriftPolicy())
    monkeypatch.setattr("tokentrim_hooks.experiments.what_if.answers.RECORDS", 4)
    lines = (tmp_path / "chunks.jsonl").read_text().splitlines()
    (tmp_path / "chunks.jsonl").write_text("\n".join([*lines[:4], *([json.dumps("never read")] * 9)]) + "\n")
    replays = ask((r for _, r in stream(tmp_path / "chunks.jsonl")), {}, [tokentrim.DriftPolicy()])
    assert replays[0].judged == 3
