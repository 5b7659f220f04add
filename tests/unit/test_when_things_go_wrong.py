"""Failures in the middle of a video: raised by default, or a warning and an unpatched video with on_error="warn"."""

import pytest
import tiny_reference as tiny
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.patching.patches import Patches
from tokentrim_hooks.pruning import tap as pruning
from tokentrim_hooks.pruning.call_scope import scoped
from tokentrim_hooks.testing import ForcedPolicy


class Fragile(ForcedPolicy):
    """Fails when it judges chunk 3."""

    def judge(self, chunk, history):
        if chunk.index == 3:
            raise ZeroDivisionError("the policy has a bug")
        return super().judge(chunk, history)


def poison(pipeline, at_call):
    """From the given generator call on, the model returns NaN."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return tuple(t * float("nan") for t in output) if len(calls) >= at_call else None

    return pipeline.generator.register_forward_hook(hook, prepend=True)


def test_a_failing_policy_raises_by_default():
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, Fragile()), pytest.raises(ZeroDivisionError):
        tiny.run(pipeline)


def test_a_failing_policy_with_warn_gives_the_unpatched_video():
    pipeline, plain = tiny.make(), tiny.run(tiny.make())
    handle = tokentrim.patch(pipeline, Fragile(), on_error="warn")
    with pytest.warns(tokentrim.TokenTrimWarning, match=r"stepped aside.*ZeroDivisionError: the policy has a bug"):
        video = tiny.run(pipeline)
    assert torch.equal(video, plain)
    assert not handle.active
    assert torch.equal(tiny.run(pipeline), plain), "once aside, it stays aside, and warns no more"
    handle.unpatch()


def test_a_failure_after_a_prune_with_warn_leaves_a_finite_video():
    """The marks that are in the cache when tokentrim steps aside must not poison the rest."""
    pipeline = tiny.make()
    tokentrim.patch(pipeline, Fragile({2: (1,)}), on_error="warn")
    with pytest.warns(tokentrim.TokenTrimWarning, match="stepped aside"):
        video = tiny.run(pipeline)
    assert torch.isfinite(video).all()
    tokentrim.unpatch(pipeline)
    assert torch.equal(tiny.run(pipeline), tiny.run(tiny.make()))


def test_nan_latents_raise():
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, tokentrim.DriftPolicy()):
        poison(pipeline, at_call=11)
        with pytest.raises(tokentrim.LatentsError, match=r"chunk at latent frame 4.*NaN or inf"):
            tiny.run(pipeline)


def test_nan_latents_with_warn_go_on():
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, tokentrim.DriftPolicy(), on_error="warn"):
        poison(pipeline, at_call=11)
        with pytest.warns(tokentrim.TokenTrimWarning, match="LatentsError"):
            video = tiny.run(pipeline)
    assert torch.isfinite(video[:, :4]).all() and video[:, 4:].isnan().all()


def test_infinite_latents_raise():
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()):
        pipeline.generator.register_forward_hook(lambda m, a, o: (o[0], o[1] * float("inf")), prepend=True)
        with pytest.raises(tokentrim.LatentsError, match="NaN or inf"):
            tiny.run(pipeline)


def test_a_missed_attention_path_turns_pruning_off_and_warns(monkeypatch):
    """The self-check of the first prune: V with marks reached a kernel, so the prune is undone."""
    from tokentrim_hooks.pruning.tap import CallTap

    def blind(self, attend, q, k, v, mask):
        return attend(q, k, v, mask)

    pipeline, plain = tiny.make(), tiny.run(tiny.make())
    monkeypatch.setattr(CallTap, "attend", blind)
    with tokentrim.patched(pipeline, ForcedPolicy({2: (1,), 3: (2,)})) as handle:
        with pytest.warns(tokentrim.TokenTrimWarning):
            video = tiny.run(pipeline)
        notes = [note for record in handle.report for note in record.notes]
    assert any("self-check failed" in note for note in notes)
    assert torch.equal(video, plain), "revived, the video is the unpatched one"
    assert handle.report.triggers == 0


def test_pruning_a_sample_leaves_the_others_alone():
    pipeline, plain = tiny.make(), tiny.run(tiny.make(), batch=3)
    with tokentrim.patched(pipeline, ForcedPolicy({2: (1, 3)}, samples=(1,))) as handle:
        video = tiny.run(pipeline, batch=3)
    torch.testing.assert_close(video[[0, 2]], plain[[0, 2]], rtol=0, atol=1e-6)
    assert (video[1] - plain[1]).abs().max() > 1e-3
    assert [(r.sample, r.dead) for r in handle.report if r.pruned] == [(1, 2 * 2 * pipeline.num_frame_per_block)]


def test_tokens_come_back_after_the_chunk_without_persist():
    """With persist=False only the pruned chunk itself is generated without the tokens."""
    seen = {}
    for persist in (True, False):
        pipeline = tiny.make(local_attn_size=21)
        with tokentrim.patched(pipeline, ForcedPolicy({2: (1,)}, persist=persist)):
            tiny.run(pipeline)
            seen[persist] = [bool(torch.isfinite(layer["v"]).all()) for layer in pipeline.kv_cache1]
    assert seen == {True: [False, False], False: [True, True]}


def test_max_regenerations_zero_prunes_nothing():
    pipeline, plain = tiny.make(), tiny.run(tiny.make())
    with tokentrim.patched(pipeline, ForcedPolicy({2: (1,)}, max_regenerations=0)):
        assert torch.equal(tiny.run(pipeline), plain)


def break_the_tap(monkeypatch, after):
    """The tap fails behind its call number ``after``: the first is the replay's, the others are the model's own."""
    calls = []
    choose = pruning.live_keys

    def live_keys(groups, device):
        calls.append(1)
        if len(calls) > after:
            raise tokentrim.UnsupportedContextError("a mask of a kind that nobody knew")
        return choose(groups, device)

    monkeypatch.setattr(pruning, "live_keys", live_keys)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_tap_that_fails_in_the_model_s_own_call_raises_by_default(monkeypatch, after):
    break_the_tap(monkeypatch, after)
    pipeline = tiny.make()
    with (
        tokentrim.patched(pipeline, ForcedPolicy({2: (1,)})),
        pytest.raises(tokentrim.UnsupportedContextError, match="nobody knew"),
    ):
        tiny.run(pipeline)
    assert torch.equal(tiny.run(pipeline), tiny.run(tiny.make()))


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_tap_that_fails_in_the_model_s_own_call_loses_no_video(monkeypatch, after):
    break_the_tap(monkeypatch, after)
    pipeline = tiny.make()
    with (
        tokentrim.patched(pipeline, ForcedPolicy({2: (1,)}), on_error="warn") as handle,
        pytest.warns(tokentrim.TokenTrimWarning, match="stepped aside.*nobody knew") as caught,
    ):
        video = tiny.run(pipeline)
    assert torch.isfinite(video).all() and not handle.active
    assert sum("stepped aside" in str(warning.message) for warning in caught) == 1
    assert torch.equal(video[:, :4], tiny.run(tiny.make())[:, :4]), "chunks before the prune"
    if after == 0:
        assert torch.equal(video, tiny.run(tiny.make())), "the prune itself failed, so nothing was pruned"
    assert torch.equal(tiny.run(pipeline), tiny.run(tiny.make()))


class Forgiving(FailurePolicy):
    """Forgives everything, and remembers it."""

    def __init__(self):
        super().__init__("warn")
        self.seen = []

    def forgives(self, failure):
        self.seen.append(failure)
        return True


class Doubler:
    def double(self, x):
        if x is None:
            raise KeyError("the model's own failure")
        return 2 * x


def failing_wrapper(when):
    def wrapper(wrapped, instance, args, kwargs):
        if when == "before":
            raise ZeroDivisionError("ours")
        value = wrapped(*args, **kwargs)
        raise ZeroDivisionError("ours", value)

    return wrapper


@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_adapters_wrapper_that_fails_costs_the_call_nothing_where_that_is_forgiven(when):
    strict = Doubler()
    Patches().wrap(strict, "double", failing_wrapper(when))
    with pytest.raises(ZeroDivisionError):
        strict.double(3)
    model, failures = Doubler(), Forgiving()
    patches = Patches(failures)
    patches.wrap(model, "double", failing_wrapper(when))
    assert model.double(3) == 6 and isinstance(failures.seen[0], ZeroDivisionError)
    with pytest.raises(KeyError, match="own failure"):
        model.double(None)
    ours = [isinstance(failure, ZeroDivisionError) for failure in failures.seen]
    assert all(ours), "what the model itself raises is not ours"
    patches.undo()
    assert "double" not in vars(model)


FORMS = {
    "plain": ({}, lambda x: x, lambda x: x),
    "heads first": ({"heads_first": True}, lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
    "packed": ({"heads": "heads"}, lambda x: x.flatten(2), lambda x: x.unflatten(2, (2, 4))),
}


@pytest.mark.parametrize(("options", "turn", "back"), FORMS.values(), ids=FORMS)
def test_stepping_aside_takes_our_marks_out_of_v_and_leaves_the_model_s_own_nan(monkeypatch, options, turn, back):
    """V may be a copy made before the marks left the cache; what else is not finite is the model's own business."""
    values = torch.ones(1, 3, 2, 4)
    values[0, 1, 0, 0], values[0, 2, 1, 3] = float("inf"), float("nan")
    given, failures = turn(values), Forgiving()
    namespace, patches = {"attend": lambda q, k, v, heads=2: v}, Patches()
    tap = pruning.CallTap(None, None, failures=failures)
    patches.tap(namespace, "attend", **options)
    monkeypatch.setattr(tap, "attend", lambda *_: 1 / 0)
    with scoped(tap):
        found = back(namespace["attend"](given, given, given, heads=2))
    patches.undo()
    assert found[0, 1, 0, 0] == 0 and found[0, 2, 1, 3].isnan() and found.nansum() == 22
    assert values[0, 1, 0, 0] == float("inf"), "the caller's tensor is not written to"


def test_a_new_video_after_a_failure_in_the_very_first_chunk():
    pipeline = tiny.make()

    def fail(module, args):
        raise MemoryError

    with tokentrim.patched(pipeline) as handle:
        trap = pipeline.generator.model.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            tiny.run(pipeline)
        trap.remove()
        tiny.run(pipeline, batch=2)
        assert [r.chunk for r in handle.report if r.video == 1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_of_a_long_message_that_is_not_ours_two_lines_are_shown():
    """As torch's of a GPU, which names environment variables for a screen."""
    failures = FailurePolicy("warn")
    with pytest.warns(tokentrim.TokenTrimWarning) as caught:
        assert failures.forgives(RuntimeError("CUDA error: first\nsecond\nthird\nfourth"))
    (warning,) = caught
    assert str(warning.message).endswith("unpatched: RuntimeError: CUDA error: first\nsecond")
