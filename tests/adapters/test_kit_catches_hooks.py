"""The kit's tests of hooks can fail: a core that hides, corrects or settles wrongly, each in one way."""

import dataclasses

import pytest
import torch
from test_reference_conformance import Reference
from tokentrim_hooks_adapters.self_forcing import SelfForcing

from tokentrim_hooks.pruning import fleeting, tap
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.rollout import steering
from tokentrim_hooks.rollout.guidance import Guidance
from tokentrim_hooks.rollout.session import Session
from tokentrim_hooks.rollout.steering import Steering
from tokentrim_hooks.testing import failures

HIDE, ONCE = "test_what_a_policy_hides_no_kernel_sees", "test_hidden_from_one_call_and_from_no_other"
CORRECT = "test_the_sampler_goes_on_with_what_a_policy_corrects"
SETTLE = "test_rows_that_a_policy_settles_are_those_of_the_commit"
NEUTRAL = "test_policies_without_an_answer_change_no_bit"
GUIDE = "test_a_guided_call_is_made_from_the_latents_that_a_policy_moves"
LOOK = "test_a_look_ahead_touches_nothing"
WEIGH, WEIGH_ONCE = "test_a_weighed_token_gets_that_share_of_attention", "test_weighed_in_one_call_and_in_no_other"
WEIGH_ONE = "test_a_weight_of_one_changes_no_bit"
ALL = {HIDE, ONCE, CORRECT, SETTLE, NEUTRAL, GUIDE, LOOK, WEIGH, WEIGH_ONCE, WEIGH_ONE}


class Rolling(Reference):
    """A cache that rolls behind a sink."""

    window = 9
    anchor_frames = 3
    chunk_to_prune = 3


def test_a_sound_core_passes():
    assert failures(Rolling, ALL) == {}


def marks_stay(patch):
    patch.setattr(fleeting.FleetingMarks, "take_off", lambda self, now=None: setattr(self, "rows", 0))


def a_frame_too_late(patch):
    true = fleeting._places
    patch.setattr(fleeting, "_places", lambda context, hidden: [
        (sample, row + context.rows_per_frame) for sample, row in true(context, hidden)])  # fmt: skip


def newest_first(patch):
    rows = property(lambda self: list(range(self.start, self.stop, self.rows_per_frame))[::-1])
    patch.setattr(CacheRows, "frame_rows", rows)


def whatever_the_phase(patch):
    true = Steering.hidden
    patch.setattr(Steering, "hidden", lambda self, call, place, context: true(
        self, call, dataclasses.replace(place, phase="first"), context))  # fmt: skip


def put_back_in_disorder(patch):
    true = fleeting._put_back_moved
    patch.setattr(fleeting, "_put_back_moved", lambda old, tags, *rest: true(old.flip(0), tags, *rest))


def one_layer_too_few(patch):
    true = fleeting.FleetingMarks.hide
    patch.setattr(fleeting.FleetingMarks, "hide", lambda self, context, hidden: true(
        self, dataclasses.replace(context, values=context.values[1:]), hidden))  # fmt: skip


def at_every_step(patch):
    patch.setattr(Session, "_correct", _correct_when(lambda steps, usual: True))


def a_step_too_early(patch):
    patch.setattr(Session, "_correct", _correct_when(lambda steps, usual: steps == usual - 1))


def _correct_when(due):
    def correct(self, step, chunk, video, output, x0, summary):
        if step.place is None or not due(chunk.steps, video.usual_steps):
            return output, x0, summary
        corrected, acts = self.steering.corrected(step.place, x0, [], video.scene)
        chunk.acts += acts
        return self.adapter.with_prediction(step.call, output, corrected), corrected, None

    return correct


def answer_forgotten(patch):
    patch.setattr(SelfForcing, "with_prediction", lambda self, call, output, x0: output)


def rows_of_the_frame_before(patch):
    true = CacheRows.own_rows
    patch.setattr(CacheRows, "own_rows", lambda self, frames: tuple(
        row - self.rows_per_frame for row in true(self, frames)))  # fmt: skip


def first_layer_only(patch):
    true = steering._write
    patch.setattr(steering, "_write", lambda old, new: None if old.layer else true(old, new))


def keys_forgotten(patch):
    true = steering._write
    patch.setattr(steering, "_write", lambda old, new: true(old, dataclasses.replace(new, keys=old.keys)))


def every_chunk(patch):
    true = Steering.settle
    patch.setattr(Steering, "settle", lambda self, call, place, context, scene: true(
        self, call, dataclasses.replace(place, index=2), context, scene))  # fmt: skip


def none_is_a_token(patch):
    def hidden(self, call, place, context):
        view = steering.view_of(context, place.grid)
        mask = torch.zeros(1, view.frames, view.tokens, dtype=torch.bool)
        mask[:, -1:, 0] = True
        return ({"any": mask} if view.frames else {}), []

    patch.setattr(Steering, "hidden", hidden)


def none_is_rounded(patch):
    true = steering._write

    def write(old, new):
        old.values.copy_(new.values * (1 + 1e-6))
        true(old, new)

    patch.setattr(steering, "_write", write)


def none_is_nearly_x0(patch):
    true = Steering.corrected

    def corrected(self, place, x0, earlier, scene):
        x0, acts = true(self, place, x0, earlier, scene)
        return x0 * (1 + 1e-6), acts

    patch.setattr(Steering, "corrected", corrected)


def looks_at_the_cache_itself(patch):
    patch.setattr(SelfForcing, "scratch", lambda self, call: {})


def copies_the_list_and_not_the_rows(patch):
    patch.setattr(SelfForcing, "scratch", lambda self, call: {
        "kv_cache": [dict(layer) for layer in call.arguments["kv_cache"]]})  # fmt: skip


def copies_all_but_the_counters(patch):
    true = SelfForcing.scratch

    def scratch(self, call):
        own = call.arguments["kv_cache"]
        copies = true(self, call)["kv_cache"]
        return {"kv_cache": [{**layer, "global_end_index": kept["global_end_index"]}
                             for layer, kept in zip(copies, own, strict=True)]}  # fmt: skip

    patch.setattr(SelfForcing, "scratch", scratch)


def looks_at_an_empty_context(patch):
    true = SelfForcing.scratch

    def scratch(self, call):
        copies = true(self, call)["kv_cache"]
        return {"kv_cache": [{**layer, "v": layer["v"] * 0} for layer in copies]}

    patch.setattr(SelfForcing, "scratch", scratch)


def moves_nothing(patch):
    true = Guidance.guided
    patch.setattr(Guidance, "guided", lambda self, given, video, chunk: (given, true(self, given, video, chunk)[1]))


def moves_before_every_call(patch):
    true = Guidance.guided

    def guided(self, given, video, chunk):
        place = dataclasses.replace(given.place, phase="first")
        return true(self, dataclasses.replace(given, place=place), video, chunk)

    patch.setattr(Guidance, "guided", guided)


def draws_a_random_number(patch):
    true = Guidance.guided

    def guided(self, given, video, chunk):
        torch.rand(1)
        return true(self, given, video, chunk)

    patch.setattr(Guidance, "guided", guided)


def sums_are_not_made_one_again(patch):
    def weighing(attend):
        return lambda q, k, v, mask: attend(q, k, v[..., :-1].contiguous(), mask)

    patch.setattr(tap, "weighing", weighing)


def weighs_the_sum_alone(patch):
    """As if w stood in the denominator only."""
    def weighing(attend):
        def twice(q, k, v, mask):
            values, weights = v[..., :-1] / v[..., -1:], v[..., -1:].expand_as(v[..., :-1]).contiguous()
            return attend(q, k, values, mask) / attend(q, k, weights, mask)

        return twice

    patch.setattr(tap, "weighing", weighing)


def weights_of_other_tokens(patch):
    true = fleeting._in_order_of_rows
    patch.setattr(fleeting, "_in_order_of_rows", lambda *given: true(*given)[::-1])


def hides_what_should_weigh(patch):
    true = fleeting.FleetingMarks.hide
    patch.setattr(fleeting.FleetingMarks, "hide", lambda self, context, hidden, weights=None: true(
        self, context, hidden if weights is None else hidden | (weights < 1)))  # fmt: skip


def weighs_in_the_first_layer_only(patch):
    true = fleeting.FleetingMarks.weighed

    def weighed(self, layer, values, rows):
        if layer:
            rows = dataclasses.replace(rows, on_device=torch.ones_like(rows.on_device))
        return true(self, layer, values, rows)

    patch.setattr(fleeting.FleetingMarks, "weighed", weighed)


def marked_elements_are_lost(patch):
    """For the kernel 0 is put in the place of marks, not the elements that were there."""
    true = fleeting.FleetingMarks.weighed

    def weighed(self, layer, values, rows):
        kept = self._layers[layer]
        self._layers[layer] = dataclasses.replace(kept, old=torch.zeros_like(kept.old))
        try:
            return true(self, layer, values, rows)
        finally:
            self._layers[layer] = kept

    patch.setattr(fleeting.FleetingMarks, "weighed", weighed)


def one_is_nearly_one(patch):
    true = Steering.hidden

    def hidden(self, call, place, context):
        found, acts = true(self, call, place, context)
        view = steering.view_of(context, place.grid)
        self.weights = torch.full((1, view.frames, view.tokens), 1 - 1e-6) if view.frames else None
        return found, acts

    patch.setattr(Steering, "hidden", hidden)


BROKEN = [
    (sums_are_not_made_one_again, {WEIGH, WEIGH_ONCE}),
    (weighs_the_sum_alone, {WEIGH, WEIGH_ONCE}),
    (weights_of_other_tokens, {WEIGH, WEIGH_ONCE}),
    (hides_what_should_weigh, {WEIGH, WEIGH_ONCE}),
    (weighs_in_the_first_layer_only, {WEIGH, WEIGH_ONCE}),
    (marked_elements_are_lost, {WEIGH, WEIGH_ONCE}),
    (whatever_the_phase, {WEIGH_ONCE}),
    (one_is_nearly_one, {WEIGH_ONE}),
    (looks_at_the_cache_itself, {LOOK}),
    (copies_the_list_and_not_the_rows, {LOOK}),
    (copies_all_but_the_counters, {LOOK}),
    (looks_at_an_empty_context, {GUIDE}),
    (moves_nothing, {GUIDE}),
    (moves_before_every_call, {GUIDE}),
    (draws_a_random_number, {LOOK}),
    (marks_stay, {ONCE}),
    (a_frame_too_late, {HIDE, ONCE}),
    (newest_first, {HIDE}),
    (whatever_the_phase, {ONCE}),
    (put_back_in_disorder, {ONCE}),
    (one_layer_too_few, {HIDE, ONCE}),
    (at_every_step, {CORRECT}),
    (a_step_too_early, {CORRECT}),
    (answer_forgotten, {CORRECT}),
    (rows_of_the_frame_before, {SETTLE}),
    (first_layer_only, {SETTLE}),
    (keys_forgotten, {SETTLE}),
    (every_chunk, {SETTLE}),
    (none_is_a_token, {NEUTRAL}),
    (none_is_rounded, {NEUTRAL}),
    (none_is_nearly_x0, {NEUTRAL}),
]  # fmt: skip
HOOKS = {"hide": {HIDE, ONCE}, "weigh": {WEIGH, WEIGH_ONCE}, "correct": {CORRECT}, "settle": {SETTLE},
         "guide": {GUIDE, LOOK}, "no answer": {NEUTRAL}}  # fmt: skip
"""The tests that are there for each; mistakes in what is judged are planted in ``test_kit_kills_mutants``."""


@pytest.mark.parametrize(("break_it", "tests"), BROKEN)
def test_a_broken_hook_fails(monkeypatch, break_it, tests):
    break_it(monkeypatch)
    assert failures(Rolling, tests).keys() == tests


@pytest.mark.parametrize("hook", HOOKS)
def test_three_mistakes_are_planted_for_each_hook(hook):
    assert len({break_it for break_it, tests in BROKEN if tests & HOOKS[hook]}) >= 3
