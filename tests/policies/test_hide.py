"""What a policy hides from a call equals -inf at those keys, in every phase, through rolls and sinks, and comes off."""

from dataclasses import dataclass

import pytest
import torch
from by_hand import FRAMES, TOKENS, ByHand, make, run
from hypothesis import given
from hypothesis import strategies as st

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.controls import AlwaysPolicy
from tokentrim_hooks.testing import ForcedPolicy

SINKS = pytest.mark.parametrize("sink", [0, 2])


def is_whole(pipeline):
    return all(bool(torch.isfinite(layer["v"]).all()) for layer in pipeline.kv_cache1)


def newest(frames, sink, anchors):
    """Dead keys where only the newest ``frames`` may be read, the chunk's own among them, as the kernel sees them."""

    def dead(keys):
        hidden = torch.zeros(1, keys, dtype=torch.bool)
        hidden[:, : max(keys - max(frames, FRAMES) * TOKENS, 0)] = True
        if keys > FRAMES * TOKENS:  # before that the sink is the chunk's own
            hidden[:, : sink * TOKENS] = not anchors
        return hidden

    return dead


@SINKS
@pytest.mark.parametrize("frames", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("anchors", [False, True])
def test_a_commit_window_equals_minus_infinity(frames, anchors, sink):
    by_hand, pipeline = make(ByHand, sink_size=sink), make(sink_size=sink)
    dead = newest(frames, sink, anchors)
    by_hand.reads = lambda kind, keys: dead(keys) if kind == "commit" else torch.zeros(1, keys, dtype=torch.bool)
    expected, plain = run(by_hand), run(make(sink_size=sink))
    with tokentrim.patched(pipeline, tokentrim.CommitWindow(frames, anchors=anchors)) as handle:
        got = run(pipeline)
    assert torch.allclose(got, expected, atol=1e-5)
    hides = (sink if anchors else 0) + max(frames, FRAMES) < 6  # the window
    assert torch.allclose(got, plain, atol=1e-5) is not hides
    assert any(act["hook"] == "hide" for record in handle.report for act in record.acts) is hides
    assert is_whole(pipeline)
    assert torch.equal(run(pipeline), plain)


@dataclass(frozen=True)
class HideSome(tokentrim.Policy):
    """Hides random tokens of the newest frames that every call of some phases could read, per sample."""

    seed: int = 0
    phases: tuple[str, ...] = ("first", "refine", "commit")

    def hide(self, chunk, context):
        if chunk.phase not in self.phases or context.frames < 2:
            return None
        mask = torch.zeros(2, context.frames, context.tokens, dtype=torch.bool)
        mask[:, -2:] = some_tokens(self.seed, chunk.start)
        return mask


def some_tokens(seed, start):
    rng = torch.Generator().manual_seed(seed * 1000 + start)
    return torch.rand(2, 2, TOKENS, generator=rng) < 0.4


@given(seed=st.integers(0, 10_000), sink=st.sampled_from([0, 1, 2]), phases=st.sets(
    st.sampled_from(["first", "refine", "commit"]), min_size=1))  # fmt: skip
def test_tokens_hidden_from_any_call_equal_minus_infinity_also_where_it_rolls_the_cache(seed, sink, phases):
    by_hand, pipeline = make(ByHand, sink_size=sink), make(sink_size=sink)
    place = {"start": -FRAMES}

    def dead(kind, keys):
        phase = {0: "first", "commit": "commit"}.get(kind, "refine")
        hidden = torch.zeros(2, keys, dtype=torch.bool)
        context = keys // TOKENS - FRAMES
        if phase in phases and context >= 2:
            hidden[:, (context - 2) * TOKENS : context * TOKENS] = some_tokens(seed, place["start"]).flatten(1)
        return hidden

    native = by_hand._call

    def call(latents, timestep, conditional, start):
        place["start"] = start
        return native(latents, timestep, conditional, start)

    by_hand._call, by_hand.reads = call, dead
    expected, plain = run(by_hand), run(make(sink_size=sink))
    with tokentrim.patched(pipeline, HideSome(seed=seed, phases=tuple(phases))):
        got = run(pipeline)
    assert torch.allclose(got, expected, atol=1e-5)
    assert is_whole(pipeline)
    assert torch.equal(run(pipeline), plain)


def test_hiding_and_pruning_together_leave_the_pruned_dead_and_the_hidden_alive():
    pipeline = make(sink_size=2)
    policies = [AlwaysPolicy(warmup=1, fraction=0.25), tokentrim.CommitWindow(3)]
    with tokentrim.patched(pipeline, policies) as handle:
        run(pipeline)
        marks = [layer["v"][:, :, 0, 0] for layer in pipeline.kv_cache1]
        assert all(bool(torch.isposinf(mark).any()) and not bool(torch.isneginf(mark).any()) for mark in marks)
        assert handle.report.triggers
    assert is_whole(pipeline)


@pytest.mark.parametrize("policy", [tokentrim.CommitWindow(0), HideSome()], ids=str)
def test_marks_that_have_left_the_window_are_forgotten_also_where_a_policy_always_hides(policy):
    pipeline = make()
    with tokentrim.patched(pipeline, [ForcedPolicy({2: (0, 1)}), policy]) as handle:
        marked = []
        pipeline.generator.register_forward_pre_hook(
            lambda *_: marked.append([bool(session.pruner._marked) for session in handle._rollout._sessions])
        )
        run(pipeline, chunks=8)
    # The prune is made at the first call of the third chunk; three chunks later its rows have been evicted.
    assert [True] in marked and all(seen == [False] for seen in marked[-10:])


def test_a_regenerated_call_hides_what_the_first_attempt_hid():
    once, both = make(), make()
    with tokentrim.patched(once, HideSome(phases=("first",))):
        expected = run(once)

    @dataclass(frozen=True)
    class Again(tokentrim.Policy):
        """Regenerates without pruning: the answer must be the same."""

        def judge(self, chunk, history):
            flags = torch.ones(2, dtype=torch.bool)
            return tokentrim.Verdict(torch.empty(2, 0, dtype=torch.long), torch.ones(2), torch.zeros(2), flags)

    with tokentrim.patched(both, [Again(), HideSome(phases=("first",))]) as handle:
        assert torch.allclose(run(both), expected, atol=1e-6)
        assert sum(record.regenerations for record in handle.report)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("call", [9, 14, 20, 24])
def test_whatever_ends_a_call_the_hidden_rows_are_seen_again(kind, call, monkeypatch):
    pipeline, plain = make(), run(make())
    with tokentrim.patched(pipeline, HideSome()) as handle:
        fresh = run(pipeline)
        handle.reset()

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.generator.model.blocks[1].self_attn, "forward", _raising(pipeline, kind, call))
            with pytest.raises(kind):
                run(pipeline)
        assert torch.equal(run(pipeline), fresh)
    assert is_whole(pipeline)
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("chunk", [3, 4, 5])
@pytest.mark.parametrize("sink", [0, 2])
def test_a_call_that_ends_between_a_roll_and_a_write_leaves_the_rows_as_they_would_be_unpatched(kind, chunk, sink):
    """The rows behind the history are then copies of hidden ones: their order says nothing, and there are more."""
    pipeline, plain, rows = make(sink_size=sink), run(make(sink_size=sink)), []
    for patched in (False, True):
        pipeline.kv_cache1 = None
        torch.manual_seed(0)
        attention = pipeline.generator.model.blocks[1].self_attn
        native, count = attention._make_room, {"calls": 0}

        shown = 2 * patched  # calls that show the order of frames

        def raising(*arguments, native=native, count=count, shown=shown):
            room = native(*arguments)
            count["calls"] += 1
            if count["calls"] == 5 * chunk + 1 + shown:
                raise kind
            return room

        attention._make_room = raising
        handle = tokentrim.patch(pipeline, HidesOnce(chunk)) if patched else None
        with pytest.raises(kind):
            run(pipeline)
        del attention._make_room
        if handle:
            handle.unpatch()
        rows.append([layer["v"].clone() for layer in pipeline.kv_cache1])
    assert all(torch.equal(*pair) for pair in zip(*rows, strict=True))
    assert torch.equal(run(pipeline), plain)


@dataclass(frozen=True)
class HidesOnce(tokentrim.Policy):
    """Hides a token of each frame, and all of the newest one, from a chunk's first call."""

    chunk: int = 3

    def hide(self, chunk, context):
        if chunk.index != self.chunk or chunk.phase != "first":
            return None
        mask = torch.zeros(context.frames, context.tokens, dtype=torch.bool)
        mask[:, 1], mask[-1:] = True, True
        return mask


def _raising(pipeline, kind, call):
    attention, count = pipeline.generator.model.blocks[1].self_attn, {"calls": 0}
    native = attention.forward

    def forward(*args, **kwargs):
        count["calls"] += 1
        if count["calls"] == call:
            raise kind
        return native(*args, **kwargs)

    return forward


@pytest.mark.parametrize(
    "answer",
    [torch.ones(3, dtype=torch.bool), torch.ones(2, 2), [True], torch.ones(2, 4, 5, dtype=torch.bool)],
    ids=["frames", "dtype", "list", "tokens"],
)
def test_a_wrong_answer_is_an_error_that_names_the_policy(answer):
    @dataclass(frozen=True)
    class Wrong(tokentrim.Policy):
        """Answers something else."""

        def hide(self, chunk, context):
            return answer

    pipeline = make()
    with tokentrim.patched(pipeline, Wrong()), pytest.raises(tokentrim.PolicyError, match=r"Wrong\.hide returned"):
        run(pipeline, chunks=2)
    assert torch.equal(run(pipeline), run(make()))
