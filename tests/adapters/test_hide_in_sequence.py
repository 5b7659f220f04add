"""What policies hide where the context lies in the sequence: against -inf at keys found by position, in each phase."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

sys.path.insert(0, str(Path(__file__).parent))
import anyflow_tiny
import framepack_tiny
import helios_tiny
import ltx_tiny
import skyreels_tiny
from dispatch_tools import dead_keys, watched
from targets import each_target
from test_anyflow_far import STARTS, dense
from video_checks import Clock

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

GRID, COUNT = (4, 4), 16
PHASES = ("first", "refine", "commit")


def newest(keep, anchors=False):
    """Hides all but the newest ``keep`` frames; anchors too, unless ``anchors``."""

    def answer(chunk, phase, flags):
        ages = [sum(not flag for flag in flags[i:]) for i in range(len(flags))]
        gone = [not anchors if flag else age > keep for flag, age in zip(flags, ages, strict=True)]
        return torch.tensor(gone, dtype=torch.bool)[None, :, None].expand(2, -1, COUNT)

    return answer


def some(seed):
    """Hides random tokens of every frame, anchors too, others in each sample."""

    def answer(chunk, phase, flags):
        rng = torch.Generator().manual_seed(1000 * seed + 10 * chunk + PHASES.index(phase))
        return torch.rand(2, len(flags), COUNT, generator=rng) < 0.3

    return answer


@dataclass(frozen=True)
class Hider(tokentrim.Policy):
    """Gives a prepared answer in some phases."""

    answer: Any = None
    phases: tuple[str, ...] = PHASES
    batch: int = 1

    def hide(self, chunk, context):
        if chunk.phase not in self.phases or not context.frames:
            return None
        return self.answer(chunk.index, chunk.phase, context.anchors)[: self.batch]


@dataclass(frozen=True)
class Family:
    """A pipeline, and where its keys lie: ``layout(chunk, phase)`` gives finished frames with their anchor flags, in
    the order of policies, and a function from dead tokens (by frame) to dead keys; None where nothing is finished.
    """

    pipeline: Callable[[], Any]
    run: Callable[..., Any]
    clock: Callable[[], Clock]
    layout: Callable[..., Any]
    kernel: Any = watched


def packed(line_of, tail):
    """History at three scales and a pinned frame: frames are numbered in the order in which they were made."""

    def layout(chunk, phase, rule):
        line = line_of(chunk)
        parts = [(line[0], 4), (line[1], 2), (line[2], 1)]
        real = sorted({frame for part in line for frame in part if frame is not None})

        def keys(dead):
            coarse = dead_keys(parts[:2], GRID, lambda f: dead[f], rule)
            pinned = [token in dead["pin"] for token in range(COUNT)]
            return coarse + pinned + dead_keys(parts[2:], GRID, lambda f: dead[f], rule) + [False] * tail

        return [("pin", True), *((frame, False) for frame in real)], keys

    return layout


def forward_line(given):
    def line_of(chunk):
        line = ([None] * 19 + list(range(given + 3 * chunk)))[-19:]
        return line[:16], line[16:18], line[18:]

    return line_of


def backward_line(chunk):
    """The nearest section comes first in history; within it frames run forward in time, so the last one is oldest."""
    line = ([(s, -f) for s in range(chunk - 1, -1, -1) for f in range(3)] + [None] * 19)[:19]
    return line[3:], line[1:3], line[:1]


def window(chunk, phase, rule):
    """SkyReels: from the second window on two finished frames lead."""
    frames = [(frame, False) for frame in range(2 if chunk else 0)]

    def keys(dead):
        return [token in dead[f] for f, _ in frames for token in range(COUNT)] + [False] * (4 - len(frames)) * COUNT

    return frames, keys


def tail(chunk, phase, rule):
    """LTX: the window's own five frames, two of the tail, one of negative time."""
    frames = [("pin", True), *((frame, False) for frame in range(2 if chunk else 0))]

    def keys(dead):
        finished = [token in dead[f] for f, anchor in frames[1:] for token in range(COUNT)]
        return [False] * 5 * COUNT + finished + [token in dead["pin"] for token in range(COUNT)]

    return frames, keys


def far(chunk, phase, rule):
    """AnyFlow: compressed frames, full ones, the chunk's own, padding."""
    writes = phase == "commit"
    squeezed = STARTS[max(chunk + 1 - (2 if writes else 3), 0)]
    frames = range(STARTS[chunk])

    def keys(dead):
        line = [key for f in range(squeezed) for key in dead_keys([([f], 2)], GRID, lambda f: dead[f], rule)]
        line += dead_keys([(range(squeezed, STARTS[chunk]), 1)], GRID, lambda f: dead[f], rule)
        own = COUNT * (STARTS[chunk + 1] - STARTS[chunk])
        queries = len(line) + own if writes else own
        return line + [False] * (own + math.ceil(queries / 128) * 128 - queries)

    return [(frame, False) for frame in frames], keys


def framepack_run(sampling):
    def run(pipe, **options):
        words = {"prompt_attention_mask": torch.ones(options.get("batch", 1), 6)}
        return framepack_tiny.run(pipe, sampling=sampling, **words, **options)

    return run


def at_latents():
    return Clock("prepare_latents")


OWN = 3 * COUNT
FAMILIES = {
    "framepack": Family(
        framepack_tiny.pipeline, framepack_run("vanilla"), at_latents, packed(forward_line(1), OWN + 8)
    ),
    "framepack backwards": Family(
        framepack_tiny.pipeline, framepack_run("inverted_anti_drifting"), at_latents, packed(backward_line, OWN + 8)
    ),
    "helios": Family(helios_tiny.pipeline, helios_tiny.run, Clock, packed(forward_line(0), OWN)),
    "skyreels-v2": Family(skyreels_tiny.pipeline, skyreels_tiny.run, at_latents, window),
    "ltx-long": Family(ltx_tiny.pipeline, ltx_tiny.run, Clock, tail),
    "anyflow-far": Family(anyflow_tiny.pipeline, anyflow_tiny.run, Clock, far, dense),
}
IN_ONE_BATCH = ("ltx-long", "anyflow-far")
"""Families whose guidance is one call over both branches; the others make two."""
GUIDED = {"framepack": {"cfg": 2.0}, "framepack backwards": {"cfg": 2.0}, "helios": {"cfg": 2.0},
          "skyreels-v2": {"guidance_scale": 3.0}, "ltx-long": {"cfg": 3.0}, "anyflow-far": {"cfg": 2.0}}  # fmt: skip


def by_hand(name, answer, phases=PHASES, rule="any", pruned=(), calls=1, batch=1, **options):
    """The unpatched pipeline with -inf at what ``answer`` hides, and at tokens ``pruned`` from chunk 2 on."""
    family, clock, place = FAMILIES[name], FAMILIES[name].clock(), {"chunk": -1, "call": 0}
    pipe = family.pipeline()

    def count(*_):
        place.update(call=place["call"] + 1 if place["chunk"] == clock.chunk else 1, chunk=clock.chunk)

    def phase(writes):
        return "commit" if writes else "first" if place["call"] <= calls else "refine"

    def hide(keys, writes=False):
        frames, keys_of = family.layout(clock.chunk, phase(writes), rule)
        mask = torch.zeros(batch, len(frames), COUNT, dtype=torch.bool)
        if phase(writes) in phases and frames:
            mask |= answer(clock.chunk, phase(writes), [flag for _, flag in frames])[:batch]
        lines = []
        for sample in mask:
            dead = {f: set(row.nonzero().flatten().tolist()) for (f, _), row in zip(frames, sample, strict=True)}
            dead[None] = set()
            lines.append(keys_of(dead))
        line = torch.tensor(lines)
        return line.repeat(options.pop("_branches", 1), 1) if line.shape[1] == keys else None

    hook = pipe.transformer.register_forward_pre_hook(count)
    with clock.on(pipe), family.kernel(hide):
        video = family.run(pipe, **({"batch": batch} if batch > 1 else {}), **options)
    hook.remove()
    return video


def hidden(name, policies, **options):
    """The patched pipeline; afterwards nothing is hidden any more, in a second video and unpatched."""
    family, pipe = FAMILIES[name], FAMILIES[name].pipeline()
    plain = family.run(pipe, **options)
    with tokentrim.patched(pipe, policies) as handle:
        video = family.run(pipe, **options)
        assert torch.equal(family.run(pipe, **options), video)
    assert any(act["hook"] == "hide" for record in handle.report for act in record.acts)
    assert torch.equal(family.run(pipe, **options), plain)
    assert (video - plain).abs().max() > 1e-3
    return video


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


ANSWERS = {"newest 1": newest(1), "newest 2, anchors kept": newest(2, True), "none": newest(0), "tokens": some(3)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("what", ANSWERS)
def test_hiding_equals_minus_infinity(name, what):
    if name in ("skyreels-v2", "ltx-long") and what == "newest 2, anchors kept":
        pytest.skip("their context is no longer: there is nothing to hide")
    close(hidden(name, Hider(answer=ANSWERS[what])), by_hand(name, ANSWERS[what]))


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_that_are_evicted_equal_minus_infinity(name):
    """All that is not the newest frame to the last bit is evicted, once it is known."""
    answers = {}

    @dataclass(frozen=True)
    class Notes(tokentrim.FrameEviction):
        """Keeps its answers."""

        def hide(self, chunk, context):
            answers[chunk.index, chunk.phase] = answer = super().hide(chunk, context)
            return answer

    def noted(chunk, phase, flags):
        answer = answers.get((chunk, phase))
        return torch.zeros(1, len(flags), COUNT, dtype=torch.bool) if answer is None else answer

    close(hidden(name, Notes(similarity=1.0, keep=1, prune_anchors=True)), by_hand(name, noted))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("phase", PHASES)
def test_hiding_in_one_phase_leaves_the_others_alone(name, phase):
    if phase == "commit" and name != "anyflow-far":
        pytest.skip("this model has no calls that only write context")
    close(hidden(name, Hider(answer=some(4), phases=(phase,))), by_hand(name, some(4), (phase,)))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_branches_of_guidance_lose_the_same(name):
    calls = 1 if name in IN_ONE_BATCH else 2
    close(hidden(name, Hider(answer=some(5)), **GUIDED[name]), by_hand(name, some(5), calls=calls, **GUIDED[name]))


@pytest.mark.parametrize("name", ["framepack", "framepack backwards", "helios", "anyflow-far"])
def test_samples_lose_their_own(name):
    got = hidden(name, Hider(answer=some(6), batch=2), batch=2)
    close(got, by_hand(name, some(6), batch=2))


@pytest.mark.parametrize("name", ["framepack", "framepack backwards", "helios", "anyflow-far"])
@pytest.mark.parametrize("answer", [newest(2), some(7)], ids=["frames", "tokens"])
def test_coarse_keys_go_with_all_of_their_tokens_if_asked(name, answer):
    close(hidden(name, Hider(answer=answer, coarse="all")), by_hand(name, answer, rule="all"))


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_and_pruned_together(name):
    """Chunk 2 is pruned, and from it on its tokens are dead, whatever else is hidden from single calls."""
    dead = {"framepack": 7, "framepack backwards": 6, "helios": 6, "anyflow-far": 3}.get(name)

    def both(chunk, phase, flags):
        mask = some(8)(chunk, phase, flags).clone()
        places = [i for i, flag in enumerate(flags) if not flag]
        mine = places if dead is None and chunk == 2 else [] if dead is None else places[:dead]
        if chunk >= 2:
            mask[:, mine, :2] = True
        return mask

    policies = [ForcedPolicy({2: (0, 1)}), Hider(answer=some(8))]
    close(hidden(name, policies), by_hand(name, both))


@each_target
def test_no_answer_changes_no_bit(target):
    pipe = target.make()
    plain, state = target.run(pipe), torch.get_rng_state()
    with tokentrim.patched(pipe, Hider(answer=None, phases=())) as handle:
        assert torch.equal(target.run(pipe), plain)
        assert torch.equal(torch.get_rng_state(), state)
    assert not any(record.acts for record in handle.report)


@each_target
@pytest.mark.parametrize("depth", ["denoiser", "block", "attention"])
def test_after_an_interrupt_nothing_stays_hidden(target, depth):
    pipe = target.make()
    plain = target.run(pipe)
    place = target.depths(pipe)[depth]
    with tokentrim.patched(pipe, AllButNewest()) as handle:
        whole = target.run(pipe)
        handle.reset()
        count = {"calls": 0}

        def stop(*_):
            count["calls"] += 1
            if count["calls"] == 5:
                raise KeyboardInterrupt

        hook = place.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            target.run(pipe)
        hook.remove()
        assert torch.equal(target.run(pipe), whole)
    assert torch.equal(target.run(pipe), plain)
    assert not torch.equal(whole, plain)


@dataclass(frozen=True)
class AllButNewest(tokentrim.Policy):
    """Hides every other token of all finished frames, from all calls."""

    def hide(self, chunk, context):
        return (torch.arange(context.tokens) % 2 == 0).expand(context.frames, -1)
