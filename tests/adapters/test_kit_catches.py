"""The conformance kit can fail: broken adapters, each broken in one way that the kit exists to find."""

import pytest
import torch
from test_reference_conformance import Reference
from tokentrim_hooks_adapters.self_forcing import SelfForcing

import tokentrim_hooks.plugins as plugins
from tokentrim_hooks import Phase
from tokentrim_hooks.plugins import AdapterInfo
from tokentrim_hooks.testing import failures


class Idle(SelfForcing):
    """Attaches, reads no call."""

    name = "broken"

    def parse(self, arguments):
        return None


class CommitIsFirst(SelfForcing):
    """Judges the clean-context call instead of the first denoising step."""

    name = "broken"

    def phase(self, call, seen):
        true = super().phase(call, seen)
        swap = {Phase.FIRST: Phase.REFINE, Phase.COMMIT: Phase.FIRST}
        return swap.get(true, true) if seen.start is not None else true


class NeverFirst(SelfForcing):
    """Takes the whole video for one chunk."""

    name = "broken"

    def phase(self, call, seen):
        return Phase.FIRST if seen.start is None else Phase.REFINE


class MissesALayer(SelfForcing):
    """Filters keys in all self-attention layers but the last."""

    name = "broken"

    def attach(self, model, patches):
        super().attach(model, patches)
        for layer in self.layers[:-1]:
            patches.tap(_home(layer), "attention", within=[layer])

    def context(self, call):
        rows = super().context(call)
        return type(rows)(rows.values[:-1], rows.start, rows.stop, rows.rows_per_frame, rows.anchors)


class PrunesTheNeighbours(SelfForcing):
    """Starts the history one row late, so that every mark lands on the next token."""

    name = "broken"

    def context(self, call):
        rows = super().context(call)
        values = [v[:, 1:] for v in rows.values]
        return type(rows)(values, 0, max(rows.stop - 1, 0), rows.rows_per_frame, rows.anchors)


class ForgetsTheSink(SelfForcing):
    """Declares no anchors on a model that has them."""

    name = "broken"

    def context(self, call):
        rows = super().context(call)
        return type(rows)(rows.values, rows.start, rows.stop, rows.rows_per_frame, 0)


class Synchronises(SelfForcing):
    """Looks at the timestep of every call."""

    name = "broken"

    def parse(self, arguments):
        arguments["timestep"].max().item()
        return super().parse(arguments)


class LeavesATrace(SelfForcing):
    """Sets an attribute that nobody takes back."""

    name = "broken"

    def attach(self, model, patches):
        super().attach(model, patches)
        self.layers[0].tokentrim_was_here = True


class DrawsNoise(SelfForcing):
    """Uses the global random state."""

    name = "broken"

    def parse(self, arguments):
        torch.rand(1)
        return super().parse(arguments)


class KnowsEverything(SelfForcing):
    """Recognises any object."""

    name = "broken"

    @classmethod
    def probe(cls, model):
        from tokentrim_hooks import Match, NoMatch

        answer = super().probe(model)
        return Match(model, (4, 4)) if isinstance(answer, NoMatch) else answer


def _home(layer):
    import sys

    return sys.modules[type(layer).__module__]


def _trial(monkeypatch, broken, only, **settings):
    info = AdapterInfo("broken", "tests", broken)
    monkeypatch.setattr(plugins, "found", lambda: plugins.Found((info,), ()))
    monkeypatch.setattr("warnings.warn", lambda *_args, **_kwargs: None)
    return failures(type("Trial", (Reference,), {"adapter": broken, **settings}), only)


SEEN = "test_every_chunk_is_seen_once_and_in_order"
EFFECT = "test_a_prune_has_an_effect_from_its_chunk_on"
KERNELS = "test_no_kernel_sees_a_dead_key"
EXACT = "test_pruning_equals_minus_infinity"


@pytest.mark.parametrize(
    ("broken", "tests"),
    [
        (Idle, {SEEN, EFFECT, EXACT}),
        (CommitIsFirst, {SEEN}),
        (NeverFirst, {SEEN, EFFECT, EXACT}),
        (PrunesTheNeighbours, {EXACT}),
        (Synchronises, {"test_one_synchronisation_a_chunk"}),
        (LeavesATrace, {"test_unpatching_leaves_no_trace", "test_patching_twice_is_refused_or_replaces"}),
        (DrawsNoise, {"test_observing_changes_no_bit"}),
        (KnowsEverything, {"test_detected_by_exactly_this_adapter"}),
    ],
)
def test_broken_adapter_fails(monkeypatch, broken, tests):
    assert _trial(monkeypatch, broken, tests).keys() == tests


def test_missed_layer_fails(monkeypatch):
    assert _trial(monkeypatch, MissesALayer, {EXACT, KERNELS}).keys() == {EXACT, KERNELS}


def test_pruned_sink_fails(monkeypatch):
    tests = {EXACT, "test_anchors_are_spared"}
    failed = _trial(monkeypatch, ForgetsTheSink, tests, window=9, anchor_frames=3, chunk_to_prune=3)
    assert failed.keys() == tests


def test_a_sink_that_nobody_declared_is_found():
    class Undeclared(Reference):
        window = 9

        def make_model(self):
            self.anchor_frames = 3
            try:
                return super().make_model()
            finally:
                del self.anchor_frames

    found = failures(Undeclared, ["test_anchors_are_spared"])
    assert "keeps 48 keys of the first chunk" in found["test_anchors_are_spared"]
    assert "anchor_frames=3" in found["test_anchors_are_spared"]


def test_sound_adapter_passes(monkeypatch):
    sound = type("Sound", (SelfForcing,), {"name": "broken"})
    assert _trial(monkeypatch, sound, {SEEN, EFFECT, EXACT, KERNELS, "test_one_synchronisation_a_chunk"}) == {}
