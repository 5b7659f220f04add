"""``tokentrim bench``: what it counts is counted right. No test looks at how long anything took."""

import dataclasses
import json

import pytest
import torch
from tiny_reference import make, run
from torch.profiler import record_function

import tokentrim_hooks as tokentrim
from tokentrim_hooks import CommitWindow
from tokentrim_hooks.cli import bench
from tokentrim_hooks.cli.main import main
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.experiments.bench import measure, targets
from tokentrim_hooks.experiments.bench.break_even import break_even, forced
from tokentrim_hooks.experiments.bench.ideal import ideal
from tokentrim_hooks.experiments.bench.measure import IDEAL, Ratio, _ratio, arms, forced_chunks, pairs, rollouts
from tokentrim_hooks.experiments.bench.memory import Alive, peak_bytes
from tokentrim_hooks.experiments.bench.profile import MODEL, profile
from tokentrim_hooks.experiments.bench.target import Size, Target

CHUNKS = 5


def tiny(size=None):
    pipeline = make()
    return Target(pipeline, lambda: run(pipeline, chunks=CHUNKS), {"layers": 2}, pipeline.generator, patch=4)


@pytest.fixture(scope="module")
def results():
    steps = []
    more = {"commit-window": CommitWindow(6)}
    found = measure.measure(tiny(), CHUNKS, 3, "cpu", lambda: steps.append(1), more)
    assert len(steps) == rollouts(3, len(found.seconds), len(found.syncs))
    return found


def test_forced_triggers_come_at_the_papers_rate():
    assert forced_chunks(20) == [8] and forced_chunks(100) == [8, 28, 48, 68, 88]
    assert forced_chunks(5) == [2] and forced_chunks(3) == [1]
    found = arms(5, tiny())
    assert found["unpatched"] is None and found["forced trigger"].at == {2: 0.1}


def test_a_target_without_a_denoiser_has_no_ideal():
    assert IDEAL not in arms(5, Target(None, lambda: None))
    assert ("observing", IDEAL) in pairs(arms(5, tiny()))


def test_the_ideal_judges_as_the_paper_does():
    """The severities of a hand-written loop are those of the policy, on the same model."""
    target = tiny()
    with ideal(target) as watcher:
        target.run()
    with tokentrim.patched(target.model, tokentrim.ObservePolicy()) as handle:
        target.run()
    found = [record.severity for record in handle.report if record.severity is not None]
    assert len(found) == CHUNKS - 1
    assert [float(severity) for severity in watcher.severities] == pytest.approx(found, rel=1e-5)
    assert not target.denoiser._forward_hooks, "it comes off"


def test_the_forced_arm_pruned_once_and_said_so(results):
    # Chunk 2 of 5 is pruned: one more call beside 5 a chunk; ceil(0.1 * 4) = 1 token in the 4 frames before it.
    assert (results.triggers, results.chunks, results.extra_calls, results.calls, results.dead) == (1, 5, 1, 25, 4)


def test_the_proof_of_a_first_prune_is_outside_of_the_clock(results):
    report = measure._once(tiny(), measure.ForcedPolicy({2: 0.1}), lambda: None, settled=True)[1]
    calls = {video: sum(r.proof_calls for r in report if r.video == video) for video in (0, 1)}
    assert calls == {0: results.proof_calls, 1: 0} and results.proof_calls == 2 and report.triggers == 2


def test_ratios_pair_arms_within_rounds(results):
    assert [r.name for r in results.ratios] == [f"{a} / {b}" for a, b in pairs(results.seconds)]
    assert {"commit-window / observing", "commit-window / unpatched", "observing / ideal"} <= {
        ratio.name for ratio in results.ratios
    }
    assert all(r.rounds == 3 and r.low <= r.median <= r.high for r in results.ratios)
    ratio = _ratio("x", [2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)
    assert _ratio("x", [1.0], [2.0]).low == -float("inf")


def test_shares_add_up_and_only_a_prune_replays(results):
    for shares in results.shares.values():
        assert sum(shares.values()) == pytest.approx(1) and {MODEL, "before", "after"} <= shares.keys()
        assert min(shares.values()) > 0
    assert "replay" in results.shares["forced trigger"] and "replay" not in results.shares["observing"]


def test_syncs_are_those_of_the_design(results):
    assert results.syncs["observing"] <= 1
    assert 1 < results.syncs["forced trigger"] <= 1 + 6  # one more a denoiser call while something is dead
    assert results.theirs["observing"] > 0


def test_memory_of_the_arms(results):
    assert 0 < results.memory["unpatched"] <= results.memory["observing"]


def test_a_scope_within_another_counts_for_itself_only():
    def work():
        for _ in range(3):
            with record_function("tokentrim.outer"):
                torch.linalg.svd(torch.ones(4, 4))
                with record_function("somebody else's"), record_function("tokentrim.inner"):
                    torch.linalg.svd(torch.ones(400, 400))

    work()  # the very first decomposition of a process loads a library, in the outer scope
    shares = profile(work, "cpu")
    assert shares.keys() == {MODEL, "outer", "inner"} and sum(shares.values()) == pytest.approx(1)
    assert shares["inner"] > shares["outer"] > 0


def test_peak_counts_tensors_alive_at_once():
    weight = torch.zeros(1000)

    def rollout():
        a = weight + 1  # 4000 bytes
        b = a * 2  # 4000 more
        del a
        c = b.view(10, 100)  # none
        del b
        return torch.cat([c.flatten()[:500], c.flatten()[:500]])  # 4000 more, after a died

    assert peak_bytes(rollout, "cpu") == 8000
    with Alive() as alive:
        kept = weight + 1
        alive.now, before = 0, alive.now
    assert before == kept.untyped_storage().nbytes()


def test_a_run_without_a_judged_chunk_is_no_measurement():
    pipeline = make()
    with pytest.raises(TokenTrimError, match="cannot be measured"):
        measure.measure(Target(pipeline, lambda: run(pipeline, chunks=1)), 1, 1, "cpu", lambda: None)


def test_a_policy_that_the_model_does_not_take_is_refused_before_anything_runs():
    target, ran = targets.skyreels(Size(chunks=3)), []
    target = dataclasses.replace(target, run=lambda: ran.append(1))
    with pytest.raises(TokenTrimError, match="CommitWindow cannot work on this model"):
        measure.measure(target, 3, 1, "cpu", lambda: None, {"commit-window": CommitWindow(6)})
    assert not ran


def test_command_prints_and_writes_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(targets.TARGETS, "reference", tiny)
    file = tmp_path / "sub" / "bench.json"
    arguments = ["bench", "--device", "cpu", "--chunks", "5", "--rounds", "2", "--json", str(file)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for words in ("observing / unpatched", "1.002", "host syncs per chunk", "peak memory", "replay", "CPU time"):
        assert words in text
    found = json.loads(file.read_text())
    assert found["settings"]["versions"]["torch"] == torch.__version__ and found["settings"]["model"]["layers"] == 2
    assert len(found["ratios"]) == 6 and found["triggers"] == 1
    added = 1000 * (found["seconds"]["observing"] - found["seconds"]["unpatched"]) / 5
    assert f"observing {added:+.2f} ms, forced trigger " in text.partition("Added per chunk: ")[2].splitlines()[0]


def test_shares_of_dead_tokens_are_arms(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(targets.TARGETS, "reference", tiny)
    monkeypatch.setattr(measure, "profile", lambda run, device: run() or {MODEL: 1.0})  # has a test of its own
    file = tmp_path / "bench.json"
    more = ["--dead", "0.3", "--dead", "0.5", "--dtype", "float32", "--json", str(file)]
    assert main(["bench", "--device", "cpu", "--chunks", "5", "--rounds", "1", *more]) == 0
    found, text = json.loads(file.read_text()), capsys.readouterr().out
    assert {"forced trigger, 30 %", "forced trigger, 50 %", "forced trigger"} <= found["seconds"].keys()
    assert found["settings"]["dead"] == [0.3, 0.5] and "A forced trigger breaks even " in text
    # ceil of 4 tokens, in the 4 frames before chunk 2; the report is that of the run's own forced arm.
    assert found["dead"] == 4


def test_arms_of_shares_prune_where_the_forced_arm_does():
    more = forced([0.3, 0.5], 30)
    assert [policy.at for policy in more.values()] == [{8: 0.3, 28: 0.3}, {8: 0.5, 28: 0.5}]
    target = tiny()
    for share, policy in zip((0.3, 0.5), forced([0.3, 0.5], CHUNKS).values(), strict=True):
        report = measure._once(target, policy, lambda: None)[1]
        assert sum(record.dead for record in report) == 4 * -(-int(10 * share * 4) // 10)


@pytest.mark.parametrize(("ratios", "share"), [
    ([1.02, 0.98, 0.94], 0.2), ([0.99, 0.98, 0.97], None), ([1.1, 1.2, 1.3], None), ([1.02], None),
])  # fmt: skip
def test_the_share_that_breaks_even(ratios, share):
    names = ["forced trigger", "forced trigger, 30 %", "forced trigger, 50 %"]
    found = [Ratio(f"{name} / unpatched", value, 0, 2, 1) for name, value in zip(names, ratios, strict=False)]
    noise = [Ratio("observing / unpatched", 5, 0, 9, 1), Ratio("forced trigger / observing", 5, 0, 9, 1)]
    assert break_even([*noise, *found], [0.3, 0.5]) == (share if share is None else pytest.approx(share))


def test_the_attention_target_is_attention():
    """As large a part as in Self-Forcing: keys over eight times the width, within two percent."""
    for full in (False, True):
        with torch.device("meta"):
            words = targets.attention(Size("meta", 3, full, "bfloat16")).words
        keys, width = 21 * words["tokens per frame"], words["dim"]
        assert 2 * keys / (8 * width) == pytest.approx(2 * 21 * 1560 / (8 * 12 * 128), rel=0.02)
    assert Size("cpu").dtype == torch.float32 and Size("cpu", precision="bfloat16").dtype == torch.bfloat16


def test_wrong_use_and_a_missing_engine_are_explained(capsys, monkeypatch):
    assert main(["bench", "--chunks", "2"]) == 2
    assert "at least 3" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "fastvideo", None)
    assert main(["bench", "--target", "fastvideo", "--device", "cpu"]) == 2
    assert "cannot import fastvideo" in capsys.readouterr().err


def test_targets_run_and_can_be_pruned():
    torch.set_num_threads(1)
    found = targets.skyreels(Size("cpu", 3))
    assert found.words["tokens per frame"] == 64
    assert measure._once(found, arms(3, found)["forced trigger"], lambda: None)[1].triggers == 1


def test_settings_name_the_machine():
    made = bench.settings("cpu", {"target": "reference", "full": False, "chunks": 3, "rounds": 1})
    assert made["device"] and made["command"].startswith("tokentrim") and made["kind"] == "cpu"
