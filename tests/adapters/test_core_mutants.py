"""What once survived as a mutant of the core (tools/mutants.py): each test fails where its mutant is planted."""

import statistics
from dataclasses import dataclass, field

import pytest
import tiny_reference
import torch
from own_loop import calls, last
from tokentrim_hooks_adapters.self_forcing import SelfForcing

import tokentrim_hooks as tokentrim
from tokentrim_hooks.adapter import Call, Phase
from tokentrim_hooks.policy.drift import RunningStatistics, Summary, token_drift
from tokentrim_hooks.policy.views import History, Verdict
from tokentrim_hooks.pruning.context import CacheRows, KeyLayout, Role, Segment
from tokentrim_hooks.pruning.key_selection import ALIVE, DeadTokens
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.pruning.tombstones import Tombstones, Traces
from tokentrim_hooks.rollout.answers import select
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.reading import read
from tokentrim_hooks.rollout.repeat.shown import Proof
from tokentrim_hooks.rollout.state import VideoState, noisy_flag
from tokentrim_hooks.testing import ForcedPolicy

FRAMES, PIXELS = 2, 8


def add_up(records, sensitivity):
    """Each record's mean, deviation and threshold, recomputed from the severities accepted before."""
    before = []
    for record in records:
        if before:
            mean, std = statistics.fmean(before), statistics.pstdev(before)
            assert record.mean == pytest.approx(mean, rel=1e-6)
            assert record.std == pytest.approx(std, rel=1e-5, abs=1e-7)
            assert record.threshold == pytest.approx(mean + sensitivity * std, rel=1e-6)
        else:
            assert record.mean is None and record.threshold is None
        if record.severity is not None:
            before.append(record.accepted_severity)


@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_statistics_are_those_of_the_accepted_severities(probe):
    pipeline = tiny_reference.make()
    policy = tokentrim.DriftPolicy(0.5, sensitivity=0.1, warmup=1)
    with tokentrim.patched(pipeline, policy, probe=probe) as handle:
        tiny_reference.run(pipeline, seed=1, chunks=8)
    assert any(r.pruned and abs(r.accepted_severity - r.severity) > 1e-4 for r in handle.report)
    assert any(r.severity is not None and not r.pruned for r in handle.report)
    add_up(list(handle.report), 0.1)


def test_a_chunk_of_more_steps_than_usual_is_judged_once():
    pipeline, steps = tiny_reference.make(), torch.tensor([1000, 750, 500, 250, 125])

    def longer(index, count, chunk):
        if index == 2:
            pipeline.denoising_step_list = steps

    with (
        pytest.warns(tokentrim.TokenTrimWarning, match="different numbers of denoising calls"),
        tokentrim.patched(pipeline, tokentrim.ObservePolicy(), probe="candidate") as handle,
    ):
        pipeline.inference(noise(6), ["a"], on_chunk=longer)
    add_up(list(handle.report), 2.0)


def noise(chunks, seed=0):
    return torch.randn(1, chunks * FRAMES, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def test_the_predecessor_is_what_was_committed():
    pipeline, first, committed = tiny_reference.make(), {}, {}

    def watch(module, args, kwargs, output):
        place = kwargs["current_start"]
        first.setdefault(place, output[1].clone())
        if not bool(kwargs["timestep"].any()):
            committed[place] = kwargs["noisy_image_or_video"].clone()

    pipeline.generator.register_forward_hook(watch, with_kwargs=True)
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle:
        tiny_reference.run(pipeline)
    size = next(iter(handle.report)).grid
    patch = PIXELS // size[0], PIXELS // size[1]
    places = sorted(first)
    for record, before, now in zip(list(handle.report)[1:], places[:-1], places[1:], strict=True):
        given, made = (Summary.of(x, patch).tokens for x in (committed[before], first[now]))
        torch.testing.assert_close(torch.tensor(list(record.drift)), token_drift(made, given)[0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- branches of guidance


@dataclass(frozen=True)
class OneTokenAnAttempt(tokentrim.Policy):
    """At the third chunk prunes token 0, then token 3 as well."""

    asked: list = field(default_factory=list)

    def judge(self, chunk, history):
        drift = chunk.drift
        wants = chunk.index == 2
        self.asked.extend([chunk.index] if wants else [])
        token = 0 if len(self.asked) < 2 else 3
        threshold = torch.zeros(len(drift)) if wants else torch.full((len(drift),), torch.inf)
        return Verdict(torch.tensor([[token]]), drift.amax(1), threshold, torch.tensor([wants]))


def marks_of_branches(policy):
    """Tokens that are marked in the caches of both branches after the first step of the third chunk."""
    pipeline, caches = tiny_reference.make(), {}

    def seen(cache):
        caches[id(cache)] = cache
        return cache

    with tokentrim.patched(pipeline, policy):
        video = calls(pipeline, 1, guidance=1.5, handed=seen)
        for _ in range(2 * 5 * 2 + 3):
            next(video)
        per_frame = pipeline.frame_seq_length
        dead = [(~torch.isfinite(cache[0]["v"][0, :, 0, 0])).nonzero()[:, 0] for cache in caches.values()]
        return [sorted(set((rows % per_frame).tolist())) for rows in dead]


def test_both_branches_of_guidance_are_pruned():
    assert marks_of_branches(ForcedPolicy({2: [0, 3]})) == [[0, 3], [0, 3]]


def test_a_second_attempt_keeps_the_tokens_of_the_first():
    assert marks_of_branches(OneTokenAnAttempt(max_regenerations=2)) == [[0, 3], [0, 3]]


def test_a_branch_is_regenerated_where_the_tokens_come_back():
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, ForcedPolicy({2: [0, 3]}, persist=False)) as handle:
        last(calls(pipeline, 1, guidance=1.5))
    assert [r.extra_calls for r in handle.report] == [0, 0, 2, 0, 0]


# ---------------------------------------------------------------------------------------------- given, switched


def test_a_given_prefix_is_neither_judged_nor_pruned():
    def inference(pipeline):
        torch.manual_seed(0)
        return pipeline.inference(noise(4), ["a"], initial_latent=noise(2, seed=1), return_latents=True)[1]

    pipeline, plain = tiny_reference.make(), inference(tiny_reference.make())
    with tokentrim.patched(pipeline, ForcedPolicy({1: (0,)})) as handle:
        tiny_reference.run(pipeline)  # pruned and proved: before a proof nothing is pruned anyway
        assert torch.equal(inference(pipeline), plain)
    assert handle.report.triggers == 1
    records = [r for r in handle.report if r.video == 1]
    assert [r.given for r in records] == [True, True, False, False, False, False]
    assert [r.severity is None for r in records] == [True, True, False, False, False, False]
    assert records[2].mean is None, "what was handed in is no measure of what the model makes"
    assert not any(r.extra_calls for r in records)


def test_latents_are_clean_only_if_all_frames_are():
    for timestep, clean in (([0, 0], True), ([0, 500], False), ([500, 500], False)):
        call = Call(noise(1), 0, timestep=torch.tensor([timestep]))
        assert bool(noisy_flag(call)) is not clean


def test_statistics_begin_anew_after_a_recache(monkeypatch):
    native = SelfForcing.phase

    def phase(self, call, seen):
        found = native(self, call, seen)
        return Phase.RECACHE if found is Phase.COMMIT and call.start == 3 * FRAMES else found

    monkeypatch.setattr(SelfForcing, "phase", phase)
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle:
        tiny_reference.run(pipeline, chunks=6)
    assert list(handle.report)[3].phases.get("recache") == 1
    assert [r.mean is None for r in handle.report] == [True, True, False, False, True, False]


def test_a_scene_has_a_first_chunk_and_severities_of_its_own():
    video = VideoState(0, None, 1, RunningStatistics.empty(1, keep=4).updated(torch.ones(1)))
    video.first = Summary.of(noise(1), (2, 2))
    video.begin_scene()
    assert video.first is None and video.statistics.count == 0 and video.statistics.keep == 4


# ---------------------------------------------------------------------------------------------- replays, reading


def test_noise_is_redrawn_for_the_first_step_only():
    drawn = []

    @dataclass(frozen=True)
    class Draws(ForcedPolicy):
        """Draws other noise and counts."""

        def redraw(self, latents, start):
            drawn.append(start)
            return torch.flip(latents, dims=(-1,))

    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, Draws({2: (0,)}), probe="candidate"):
        tiny_reference.run(pipeline)
    assert drawn == [2 * FRAMES]


def test_a_carried_step_is_the_new_x0_with_the_old_noise():
    adapter, scheduler = SelfForcing(), tiny_reference.make().scheduler
    adapter.generator = tiny_reference.make().generator
    before, after, drawn = (noise(1, seed) for seed in (1, 2, 3))
    for step in (750, 250):
        steps = torch.full((1, FRAMES), step)
        noisy, expected = (scheduler.add_noise(x0[0], drawn[0], steps)[None] for x0 in (before, after))
        carried = adapter.carry(Call(noisy, 0, timestep=steps), before, after)
        torch.testing.assert_close(carried, expected, rtol=1e-5, atol=1e-5)


def test_samples_that_were_not_flagged_keep_their_output():
    old, new = torch.zeros(3, 2), torch.ones(3, 2)
    assert select([False, True, False], (new,), (old,))[0][:, 0].tolist() == [0, 1, 0]


def test_flags_that_waited_are_told_from_the_call_s_own():
    one = torch.ones(1, dtype=torch.float64)
    verdict, history = Verdict(torch.zeros(1, 1, dtype=torch.long), one, one, one > 2), History(1, one, one)
    no, yes = torch.tensor(False), torch.tensor(True)
    reading = read(verdict, torch.ones(1, 4), history, noisy=yes, waiting=[no, yes, yes])
    assert (reading.clean, reading.waiting) == (False, [True, False, False])
    reading = read(verdict, torch.ones(1, 4), history, noisy=no, waiting=[yes, yes])
    assert (reading.clean, reading.waiting) == (True, [False, False])


def test_a_prune_is_not_proved_while_a_layer_is_not_tapped():
    for tapped in (1, 2):
        pruner = Pruner(SelfForcing(), (2, 2), ForcedPolicy({}), Proof(expected=2))
        pruner._last = CallTap(None, DeadTokens())
        pruner._last.calls, pruner._last.dead_keys = tapped, 4
        assert pruner.check(finite=True) is (tapped == 2)


def test_what_is_only_hidden_proves_nothing_of_a_prune():
    pruner = Pruner(SelfForcing(), (2, 2), ForcedPolicy({}), Proof(expected=1))
    pruner._last = CallTap(None, DeadTokens())
    pruner._last.calls, pruner._last.dropped = 1, 4
    assert pruner.check(finite=True) is False and "0 dead keys" in pruner.proof.finding


# ---------------------------------------------------------------------------------------------- marks, keys


def test_chunks_in_flight_ask_with_the_first_of_their_frames():
    """Two chunks share a segment: what the second pruned is alive to the first, whose queries are in it, too."""
    frames = {Role.CONTEXT: range(4), Role.FLIGHT: range(4, 8), Role.CURRENT: range(8, 10)}
    layout = KeyLayout(tuple(Segment(role, tuple(some), 1, 1) for role, some in frames.items()))
    dead = DeadTokens()
    dead.kill(layout, [[0]], start=6, grid=(1, 1))
    context, flight, current = dead.live(layout, 1)
    assert flight.alive[0, 4:8].all() and not current.alive[0, :8].any() and current.alive[0, 8:].all()
    assert context.start == 0


def test_branches_in_one_batch_share_the_verdict_of_their_sample():
    """Guidance repeats the batch as a whole, ``[a, b, a, b]``, so sample ``i`` is judged as ``i % B``."""
    dead = DeadTokens(killed_by={0: torch.tensor([[0, ALIVE], [ALIVE, 0]])}, grid=(1, 2))
    layout = KeyLayout((Segment(Role.CONTEXT, (0,), 1, 2),))
    [group] = dead.live(layout, samples=4)
    assert group.alive.tolist() == [[False, True], [True, False]] * 2


def test_marks_are_lost_with_the_memory_of_any_layer():
    layers = [torch.zeros(1, 4, 1, 1) for _ in range(2)]
    traces = Traces.of(layers)
    assert not traces.lost
    layers.pop()
    assert traces.lost


def test_a_row_that_was_marked_twice_comes_back_as_it_was():
    values = torch.arange(8.0).reshape(1, 4, 2, 1)
    rows, before, marks = CacheRows([values], 0, 4, 2), values.clone(), Tombstones()
    marks.mark(rows, [[0]])
    marks.mark(rows, [[0, 1]])
    marks.revive()
    assert torch.equal(values, before)
