"""A prune is checked at every replay, and marks that reach attention behind our back are taken out of the cache."""

import pytest
import tiny_reference as tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference import model as reference
from tokentrim_hooks.rollout.repeat import snapshot
from tokentrim_hooks.rollout.repeat.proof import SHORT, NullReplay
from tokentrim_hooks.rollout.repeat.recall import Recall
from tokentrim_hooks.testing import ForcedPolicy

CALLS_PER_CHUNK = 5


class Bypass:
    """From call ``at`` of the generator on, attention goes a way that is not tapped."""

    def __init__(self, pipeline, at, monkeypatch):
        self.calls, self.at, self.monkeypatch = 0, at, monkeypatch
        self.hook = pipeline.generator.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            self.monkeypatch.setattr(reference, "attention", reference._dot_product)


@pytest.fixture
def plain():
    return tiny.run(tiny.make(), chunks=7)


def test_a_later_prune_that_is_not_tapped_is_undone_and_said(monkeypatch, plain):
    pipeline = tiny.make()
    # Chunk 2 is pruned, and its rows come back with it; chunk 5 is pruned behind our back.
    handle = tokentrim.patch(pipeline, ForcedPolicy({2: (1,), 5: (0,)}, persist=False))
    Bypass(pipeline, 5 * CALLS_PER_CHUNK + 1, monkeypatch)
    with pytest.warns(tokentrim.TokenTrimWarning, match="could not be proved"):
        video = tiny.run(pipeline, chunks=7)
    assert torch.isfinite(video).all()
    assert [record.pruned for record in handle.report] == [False, False, True, False, False, False, False]
    assert handle.report.records[5].notes == ("self-check failed: pruning is off",)
    handle.unpatch()


def test_marks_that_reach_untapped_attention_are_recognised_and_the_call_is_repeated(monkeypatch, plain):
    pipeline = tiny.make()
    handle = tokentrim.patch(pipeline, ForcedPolicy({2: (1,), 4: (0,)}))
    Bypass(pipeline, 3 * CALLS_PER_CHUNK + 5, monkeypatch)  # 3 calls more: in chunk 3, with a dead row
    with pytest.warns(tokentrim.TokenTrimWarning, match="reached attention that is not tapped"):
        video = tiny.run(pipeline, chunks=7)
    assert torch.isfinite(video).all() and not torch.equal(video, plain)
    assert handle.report.triggers == 1, "nothing is pruned any more"
    assert "marks reached attention" in handle.report.records[3].notes[0]
    assert all(torch.isfinite(layer["v"]).all() for layer in pipeline.kv_cache1)
    handle.unpatch()


def test_a_model_that_diverges_by_itself_is_not_taken_for_a_leak():
    pipeline = tiny.make()
    tokentrim.patch(pipeline, ForcedPolicy({2: (1,)}))
    late = 4 * pipeline.num_frame_per_block * pipeline.frame_seq_length  # the fifth chunk; no call is counted

    def poison(module, args, kwargs, output):
        return tuple(part * float("nan") for part in output) if kwargs["current_start"] >= late else None

    pipeline.generator.register_forward_hook(poison, with_kwargs=True)
    with pytest.raises(tokentrim.LatentsError, match="the model itself diverged"):
        tiny.run(pipeline, chunks=7)


def test_a_refusal_that_says_more_is_the_same_one(monkeypatch):
    """Ranks have agreed on it: of another one they were told once more, and that word nobody would hear."""
    monkeypatch.setattr(snapshot, "BUDGET", 0)
    cache, failure = torch.zeros(1, 8, 1, 4), tokentrim.UnsupportedContextError("it gave something else.")
    null = NullReplay(torch.nn.Identity(), cache.sum, Recall(), [None])
    null.remember(cache.sum(), {"cache": cache}, cache.sum())
    with pytest.raises(tokentrim.UnsupportedContextError) as raised, null.undone_if_refused():
        cache.add_(1)
        raise failure
    assert raised.value is failure and str(failure) == f"it gave something else. {SHORT}"
