"""However long it runs: what is dead and gone costs nothing any more, and records stay small."""

from __future__ import annotations

import tracemalloc

import framepack_tiny
import pytest
import tiny_reference
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.drift import Summary
from tokentrim_hooks.rollout import records
from tokentrim_hooks.rollout.judgement import Judgement
from tokentrim_hooks.rollout.reading import read
from tokentrim_hooks.testing import ForcedPolicy, count_syncs

CHUNKS = 14


def syncs_of_chunks(policy):
    """Our synchronisations, chunk by chunk, of a run over a window of three chunks."""
    pipeline = tiny_reference.make()
    seen = []
    with count_syncs() as log, tokentrim.patched(pipeline, policy) as handle:
        noted = []

        def note(*_):
            noted.append(sum(event.ours for event in log.events))

        pipeline.generator.register_forward_hook(note, always_call=True)
        tiny_reference.run(pipeline, chunks=CHUNKS)
        calls = [sum(r.phases.values()) + r.extra_calls + r.proof_calls for r in handle.report]
    place = 0
    for count in calls:
        before = noted[place - 1] if place else 0
        place += count
        seen.append(noted[place - 1] - before)
    return seen


@pytest.mark.parametrize("persist", (True, False))
def test_one_synchronisation_a_chunk_again_once_nothing_dead_is_to_be_seen(persist):
    """Before the prune, while rows are dead in the window, and after they have rolled out of it."""
    never = syncs_of_chunks(tokentrim.ObservePolicy())
    pruned = syncs_of_chunks(ForcedPolicy({3: [0, 3]}, persist=persist))
    assert set(never[2:]) == {1}
    assert pruned[:3] == never[:3] and pruned[3] > 1
    assert set(pruned[-4:]) == {1}, pruned
    assert (max(pruned[4:8]) > 1) is persist, pruned


def test_frames_that_have_left_a_packed_history_are_forgotten():
    """A prune at every section: what is remembered stays as large as the history that the model reads."""
    pipeline = framepack_tiny.pipeline()
    sections = 12
    with tokentrim.patched(pipeline, ForcedPolicy({n: [0] for n in range(1, sections)})) as handle:
        framepack_tiny.run(pipeline, sections=sections)
        (session,) = handle._rollout._sessions
        remembered = set(session.pruner._dead_tokens.killed_by)
    assert handle.report.triggers == sections - 1
    assert 0 < len(remembered) < framepack_tiny.WINDOW * (sections - 2)


def test_a_report_keeps_the_drift_of_the_latest_chunks_only(monkeypatch):
    monkeypatch.setattr(records, "KEPT", 3)
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle:
        tiny_reference.run(pipeline, batch=2, chunks=7)
    for sample in range(2):
        own = [record for record in handle.report if record.sample == sample]
        assert [len(record.drift) for record in own] == [0, 0, 0, 0, 4, 4, 4]
        assert all(record.severity is not None for record in own[1:])


def test_a_chunk_makes_two_summaries(monkeypatch):
    made, summarise = [], Summary.of

    def counted(latents, patch_size):
        made.append(1)
        return summarise(latents, patch_size)

    monkeypatch.setattr(Summary, "of", counted)
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()):
        tiny_reference.run(pipeline, chunks=4)
        few = len(made)
        tiny_reference.run(pipeline, chunks=14)
    assert len(made) - few == few + 2 * 10


def test_what_a_record_takes_in_memory():
    """At 1,560 tokens: four bytes for the drift of each, and a reference for each token of the unstable set."""
    tokens, unstable, count = 1560, 156, 50
    drift = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0))
    severity, worst = drift.topk(unstable)
    verdict = tokentrim.Verdict(worst, severity.mean(1), severity.mean(1), torch.tensor([False]))
    history = tokentrim.History(2, severity.mean(1), severity.std(1))
    judgements = [Judgement(None, drift, reading=read(verdict, drift, history)) for _ in range(count + 1)]
    told = [records._verdict(judgements[0], judgements[0].reading, 0)]
    tracemalloc.start()
    told += [records._verdict(judgement, judgement.reading, 0) for judgement in judgements[1:]]
    taken = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    assert told[-1]["tokens"] == tuple(worst[0].tolist())
    assert 4 * tokens < taken < 4 * tokens + 8 * unstable + 1500
