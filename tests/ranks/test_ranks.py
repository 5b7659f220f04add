"""Ranks that share one model agree on verdict, tokens and failures; ranks that do not stay independent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import scenarios
import shared_model
import tiny_reference as tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.ranks.channel import Channel
from tokentrim_hooks.ranks.options import in_words
from tokentrim_hooks.testing import ForcedPolicy

pytestmark = pytest.mark.checks("self-forcing", "ranks")
"""The shared model is the reference model, whose adapter that is."""

HERE = Path(__file__).parent
PATIENCE = 420
"""Seconds for all scenarios of a job on a busy machine; a hang ends here (one takes the rest of it)."""
JUDGED = tiny.CHUNKS - 1
PATCH = 2
"""Words at patch(): the first rank's options, and whether all have the same."""
PROOF = 3
"""Words once per model: can a call show the order of rows, can it be made twice, was there anything to prune?"""
NEITHER = "neither raised nor hung"


class Job:
    """Ranks that ran all their scenarios; asked for one, it gives what each rank has found."""

    def __init__(self, folder, size):
        self.folder, self.size, self.said = folder, size, []
        paths = [HERE, HERE.parent / "adapters", HERE.parent / "unit", *sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        command = [sys.executable, str(HERE / "scenarios.py"), str(folder)]
        ranks = [
            subprocess.Popen([*command, str(r), str(size)], env=environment, stderr=subprocess.PIPE, text=True)
            for r in range(size)
        ]
        try:
            self.said = [process.communicate(timeout=PATIENCE)[1][-3000:] for process in ranks]
        except subprocess.TimeoutExpired:
            self.said = ["hung"]
        finally:
            for process in ranks:
                process.kill()
                process.wait()

    def __getitem__(self, name):
        files = [self.folder / f"{name}.{rank}" for rank in range(self.size)]
        missing = [file.name for file in files if not file.exists()]
        assert not missing, f"no end of {missing}: {self.said}"
        return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(params=["two", "four"])
def job(request):
    return request.getfixturevalue(request.param)


def agree(ranks, *, video=True):
    """All ranks have the same records, and the same video where their noise was the same."""
    for rank in ranks:
        assert rank["error"] is None and rank["warnings"] == [], rank
        assert rank["records"] == ranks[0]["records"]
        assert not video or torch.equal(rank["video"], ranks[0]["video"])
    return ranks[0]


def pruned(found):
    """(chunk, tokens) of what was pruned."""
    return [(record[1], record[8]) for record in found["records"] if record[7]]


def in_one_process(policy, run=tiny.run, **options):
    with tokentrim.patched(shared_model.whole(), policy, **options) as handle:
        return run(handle._rollout._model()), scenarios.records(handle)


def close(records, others):
    """Records of two runs that added up in another order."""
    for one, other in zip(records, others, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a == pytest.approx(b, abs=1e-4)) if isinstance(a, float) else a == b, (one, other)


# ------------------------------------------------------------------------------------------ agreement


def test_heads_over_ranks_are_as_one_process(job):
    found = agree(job["forced"])
    video, records = in_one_process(scenarios.FORCED)
    torch.testing.assert_close(found["video"], video, rtol=0, atol=1e-4)
    close(found["records"], records)
    assert pruned(found) == [(2, (1, 3))] and (video - tiny.run(shared_model.whole())).abs().max() > 1e-2


def test_all_adopt_the_first_rank_s_verdict_and_tokens(job):
    """Each rank would prune other tokens, and a second time at another chunk; two chunks later they are still equal."""
    found = agree(job["own-verdict"])
    assert pruned(found) == [(2, scenarios.OTHER[0]), (4, (0,))]
    video, records = in_one_process(ForcedPolicy({2: scenarios.OTHER[0], 4: (0,)}))
    torch.testing.assert_close(found["video"], video, rtol=0, atol=1e-4)
    close(found["records"], records)


def test_uneven_noise(job):
    """Severities differ by rank, and with them mean and threshold; all go by the first rank's."""
    ranks = job["uneven-noise"]
    found = agree(ranks, video=False)
    assert pruned(found) and not torch.equal(ranks[0]["video"], ranks[1]["video"])


def test_of_a_batch_the_same_samples_are_pruned(two):
    found = agree(two["own-samples"])
    assert [(record[1], record[12]) for record in found["records"] if record[7]] == [(2, 0)]


def test_the_finished_chunk_is_judged(two):
    found = agree(two["candidate"])
    video, _ = in_one_process(ForcedPolicy({2: scenarios.OTHER[0], 4: (0,)}), probe="candidate")
    torch.testing.assert_close(found["video"], video, rtol=0, atol=1e-4)
    assert [record[11] for record in found["records"]] == [0, 0, 4, 0, 4]


def test_two_regenerations(two):
    found = agree(two["twice"])
    assert [record[10] for record in found["records"]] == [0, 0, 2, 0, 0]
    assert found["posts"] == PATCH + JUDGED + PROOF + 2


@pytest.mark.parametrize("persist", [True, False])
def test_branches_of_guidance(two, persist):
    """Without persist the other branch is pruned behind its call and called again: two words more."""
    found = agree(two["guided" if persist else "guided-fleeting"])
    at = {2: scenarios.OTHER[0], 4: (0,)} if persist else {2: scenarios.OTHER[0]}
    video, records = in_one_process(ForcedPolicy(at, persist=persist), scenarios.guided)
    torch.testing.assert_close(found["video"], video, rtol=0, atol=1e-3)
    assert found["posts"] == PATCH + JUDGED + PROOF + (2 if persist else 1 + 2)
    assert [record[9] for record in found["records"]] == [record[9] for record in records]


def test_a_context_in_the_sequence(two):
    assert pruned(agree(two["packed"]))[0] == (2, scenarios.OTHER[0])


def test_the_first_rank_counts_where_another_is_undecided(two):
    assert pruned(agree(two["undecided-follower"])) == [(2, (1, 3))]
    for rank in two["undecided-leader"]:
        assert pruned(rank) == [] and torch.equal(rank["video"], rank["plain"])


def test_a_verdict_that_is_too_long_for_one_word(two):
    assert agree(two["long-words"])["records"] == two["own-verdict"][0]["records"]


def test_an_adapter_may_say_which_ranks_share_the_model(two):
    assert pruned(agree(two["declared"])) == [(2, scenarios.OTHER[0]), (4, (0,))]


def test_a_prune_that_one_rank_cannot_prove_is_undone_on_all(job):
    """Rank 1's tap sees no call."""
    for rank in job["blind"]:
        assert rank["error"] is None and pruned(rank) == [] and rank["active"]
        assert torch.equal(rank["video"], rank["plain"])
        assert sum("could not be proved" in words for words in rank["warnings"]) == 1


# ------------------------------------------------------------------------------------------ calls made twice


def test_all_make_the_second_call_where_one_rank_rounds_otherwise(two):
    found = two["rounding"]
    assert pruned(agree(found, video=False)) == [(2, (1, 3))]
    for rank in found:
        # For the second call, whether any rank has shown counts in it, and the regeneration.
        assert rank["posts"] == PATCH + JUDGED + PROOF + 1 + 1 + 1
        assert [record[13] for record in rank["records"]] == [0, 0, 3, 0, 0]


def test_a_model_that_keeps_something_on_one_rank_is_refused_on_all(two):
    first, second = two["remembering-model"]
    assert second["error"][0] == "UnsupportedContextError" and "keeps a memory" in second["error"][1]
    assert first["error"][0] == "RankError" and "UnsupportedContextError" in first["error"][1]
    for rank in two["remembering-model-aside"]:
        assert rank["error"] is None and not rank["active"] and torch.equal(rank["video"], rank["plain"])


# ------------------------------------------------------------------------------------------ tokens over ranks


@pytest.mark.parametrize("name", ["tokens-divided", "tokens-divided-no-group"])
def test_a_model_that_divides_tokens_is_refused(two, name):
    """Its video is that of one process; what a row is only the rank knows that keeps it."""
    for rank in two[name]:
        kind, words = rank["error"]
        assert kind == "UnsupportedContextError" and "4 of the chunk's 8 tokens on this rank" in words, rank
        torch.testing.assert_close(rank["plain"], tiny.run(shared_model.whole()), rtol=0, atol=1e-4)


def test_a_model_that_divides_the_picture_is_refused_before_anything_is_pruned(two):
    """Each rank's own verdict would be about other tokens, whose numbers mean nothing on the others."""
    for rank in two["picture-divided"]:
        kind, words = rank["error"]
        assert kind == "RankError" and "ranks 0 and 1 judge other tokens" in words, rank
        assert pruned(rank) == []


@pytest.mark.parametrize("name", ["tokens-divided-aside", "picture-divided-aside"])
def test_a_model_that_divides_tokens_is_left_alone(two, name):
    for rank in two[name]:
        assert rank["error"] is None and not rank["active"] and pruned(rank) == []
        assert torch.equal(rank["video"], rank["plain"])
        assert sum("stepped aside" in words for words in rank["warnings"]) == 1


# ------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize("name", ["forced", "own-verdict", "candidate"])
def test_one_word_a_judged_chunk_and_one_a_regeneration(two, name):
    for rank in two[name]:
        assert rank["posts"] == PATCH + JUDGED + PROOF + len(pruned(rank))


def test_data_parallel_ranks_stay_independent_and_say_nothing(two):
    first, second = two["data-parallel"]
    assert (first["posts"], second["posts"]) == (0, 0)
    assert pruned(first) == [(2, scenarios.OTHER[0]), (4, (0,))] and pruned(second) == [(2, (0,)), (3, (0,))]


# ------------------------------------------------------------------------------------------ failures

PLACES = ("judge-0", "judge-1", "second-judge-0", "second-judge-1", "carry", "context-of-call", *scenarios.SABOTAGES)


def failing(place):
    return 0 if place.endswith("judge-0") else 1


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_on_one_rank_is_raised_on_every_rank(two, place):
    ranks, only = two[f"{place}-raise"], failing(place)
    for number, rank in enumerate(ranks):
        kind, words = rank["error"] or (NEITHER, "")
        assert kind == ("Planted" if number == only else "RankError"), rank
        assert number == only or (f"rank {only} of the group has failed" in words and "Planted: " in words)
        assert rank["warnings"] == [] and "at_unpatch" not in rank
    if ranks[0]["again"] is not None:
        again = [rank["again"] for rank in ranks]
        assert torch.equal(again[0], again[1]) and not torch.equal(again[0], ranks[0]["plain"]), "a video afterwards"


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_on_one_rank_makes_all_step_aside(two, place):
    ranks, only = two[f"{place}-warn"], failing(place)
    for number, rank in enumerate(ranks):
        assert rank["error"] is None and not rank["active"]
        told = [words for words in rank["warnings"] if "stepped aside" in words]
        assert len(told) == 1 and ("RankError" in told[0]) == (number != only), rank["warnings"]
        # That one model is not divided, and the failing rank is aside a few calls earlier, with something pruned.
        assert place == "context-of-call" or torch.equal(rank["video"], ranks[0]["video"])
        assert torch.isfinite(rank["video"]).all()
        if not pruned(rank):
            assert torch.equal(rank["video"], rank["plain"])


def test_of_four_ranks_one_fails(four):
    for name in ("judge-1-raise", "replay-raise"):
        assert [rank["error"][0] for rank in four[name]] == ["RankError", "Planted", "RankError", "RankError"]
    for name in ("judge-1-warn", "parse-warn"):
        assert all(torch.equal(rank["video"], rank["plain"]) and not rank["active"] for rank in four[name])


def test_ctrl_c_on_one_rank_while_it_judges(two):
    first, second = two["interrupted"]
    assert second["error"][0] == "KeyboardInterrupt"
    assert first["error"][0] == "RankError" and "KeyboardInterrupt" in first["error"][1]
    assert torch.equal(first["again"], second["again"])


def test_ranks_that_are_at_different_places_are_told_so(two):
    for rank in two["out-of-step"]:
        kind, words = rank["error"]
        assert kind == "RankError" and "out of step" in words and "batch 1" in words and "batch 2" in words


def test_a_failure_behind_the_last_verdict_is_raised_at_the_end(two):
    """Nobody else hears of it any more, and the next patch on the same group is not harmed."""
    first, second = (rank["first"] for rank in two["unheard"])
    assert "at_unpatch" not in first and second["at_unpatch"] == ("Planted", "parse has a bug")
    assert pruned(agree([rank["second"] for rank in two["unheard"]])) == [(2, (1, 3))]


def test_a_rank_that_is_gone(tmp_path):
    """The others do not wait for it for ever."""
    store, gone = tmp_path / "store", "import os; scenarios.ForcedPolicy.judge = lambda *_: os._exit(0)"
    code = (
        "import sys, scenarios, torch.distributed as dist\n"
        "rank = int(sys.argv[1])\n"
        f"dist.init_process_group('gloo', store=dist.FileStore({str(store)!r}, 2), rank=rank, world_size=2)\n"
        f"if rank: {gone}\n"
        "print(scenarios.rollout(scenarios.FORCED, make=scenarios.shared_model.whole)['error'][0])\n"
    )
    paths = os.pathsep.join(map(str, [HERE, HERE.parent / "adapters", HERE.parent / "unit", *sys.path]))
    environment = {**os.environ, "PYTHONPATH": paths}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(r)], env=environment, stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    assert ranks[0].communicate(timeout=240)[0] == "RankError\n"
    ranks[1].communicate(timeout=60)


# ------------------------------------------------------------------------------------------ the option


def refused_on_all(ranks, name):
    *others, last = [rank["error"] for rank in ranks]
    assert f"patched with {name} = " in last and "same options on all ranks" in last
    assert all(f"rank {len(others)} of the group has failed" in words and name in words for words in others)
    for rank in ranks:
        assert not rank["patched"]
        torch.testing.assert_close(rank["plain"], tiny.run(shared_model.whole()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", scenarios.UNLIKE)
def test_other_options_on_one_rank_are_refused_on_all(two, name):
    """By them one would raise where the others go on, call once more, or hide other rows."""
    refused_on_all(two[f"unlike-{name}"], name)


def test_of_four_ranks_one_has_other_options(four):
    refused_on_all(four["unlike-on_error"], "on_error")


def test_the_same_options_have_the_same_words_on_all_ranks():
    """Sets have another order in each process (0 and 8 fall on one place), objects another address, ranks own cards."""
    one, other = (
        [set(order), {"a": frozenset(order), "b": lambda: 0}, torch.device("cuda", card), f"cuda:{card}", (object(),)]
        for card, order in ((0, (0, 8)), (1, (8, 0)))
    )
    assert repr(one[0]) != repr(other[0]), "nothing to see"
    assert in_words(one) == in_words(other)
    assert in_words([1, {8, 0}]) != in_words([1, {8, 1}])


@pytest.mark.parametrize("group", ["world", 0, [0, 1]])
def test_a_group_that_is_none(group):
    pipeline = tiny.make()
    with pytest.raises(TypeError, match=r"process group of torch\.distributed"):
        tokentrim.patch(pipeline, group=group)
    assert not tokentrim.is_patched(pipeline)


def test_a_group_of_one_rank_says_nothing(tmp_path, monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(Channel, "__init__", lambda *_: pytest.fail("a channel for one rank"))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with tokentrim.patched(tiny.make(), scenarios.FORCED, group=dist.group.WORLD) as handle:
            tiny.run(handle._rollout._model())
        assert handle.report.triggers == 1
    finally:
        dist.destroy_process_group()
