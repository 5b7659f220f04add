"""SANA-WM's refiner, the real diffusers pipeline with tiny random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tokentrim_hooks_adapters.sana_wm import SanaWM

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Adapter
from tokentrim_hooks.testing import AdapterConformance, ForcedPolicy

sys.path.insert(0, str(Path(__file__).parent))
import sana_wm_tiny as tiny
from dispatch_tools import watched
from video_checks import Clock, assert_exact, assert_refuses_a_cache_and_parallelism, observed

torch.set_num_threads(1)
TOKENS, COUNT, WHEN = [0, 5, 17], 24, 3
"""Tokens of 4 x 6 that are pruned, and the chunk at which: the window has just begun to slide."""


def clock():
    """The pipeline sets its timesteps once for the video, and once more for every chunk."""
    return Clock(given=-1)


def dead_at(chunk, keys, when=WHEN, tokens=TOKENS, sink=tiny.SINK, history=tiny.HISTORY, anchors=False):
    """Dead keys by counting: the sink's frame, frames of history, the chunk's three; None for cross attention."""
    frames = list(range(sink, sink + tiny.BLOCK * chunk))[-history:]
    line = [anchors] * sink + [frame < sink + tiny.BLOCK * when for frame in frames] + [False] * tiny.BLOCK
    if chunk < when or keys != COUNT * len(line):
        return None
    return torch.tensor([flag and token in tokens for flag in line for token in range(COUNT)])


def reference(pipe, plan, seed=5, anchors=False, **options):
    ticks = clock()

    def hide(keys):
        sizes = {name: options[name] for name in ("sink",) if name in options}
        found = [dead_at(ticks.chunk, keys, when, tokens, anchors=anchors, **sizes) for when, tokens in plan.items()]
        found = [dead for dead in found if dead is not None]
        return torch.stack(found).any(0) if found else None

    given = {"sink_size": options["sink"], "kv_max_frames": options["sink"] + tiny.HISTORY} if options else {}
    with ticks.on(pipe), watched(hide):
        return tiny.run(pipe, seed, **given)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


CASES = {
    "in the first chunk that can be": {1: TOKENS},
    "before the window slides": {2: TOKENS},
    "behind": {5: TOKENS},
    "two prunes": {2: TOKENS, 3: [1, 5]},
}


@pytest.mark.parametrize("plan", CASES.values(), ids=CASES)
def test_pruning_equals_minus_infinity_from_the_start_of_the_chunk(pipe, plan):
    assert_exact(pipe, tiny.run, ForcedPolicy(plan), reference(pipe, plan), triggers=len(plan))


def test_the_sink_dies_only_where_asked(pipe):
    plan = {WHEN: TOKENS}
    with_sink = reference(pipe, plan, anchors=True)
    assert (with_sink - reference(pipe, plan)).abs().max() > 1e-3
    assert_exact(pipe, tiny.run, ForcedPolicy(plan, prune_anchors=True), with_sink)


@pytest.mark.parametrize("sink", [2, 3])
def test_other_sinks(pipe, sink):
    plan = {WHEN: TOKENS}
    options = {"sink_size": sink, "kv_max_frames": sink + tiny.HISTORY}
    assert_exact(pipe, tiny.run, ForcedPolicy(plan), reference(pipe, plan, sink=sink), **options)


def test_the_shipped_window_of_ten_frames(pipe):
    """Which cuts chunks: 1 + 10 frames, and a last chunk of two."""
    latents, plan = tiny.noise(1, tiny.CHANNELS, 24, *tiny.GRID), {4: TOKENS}

    def run(model):
        return model(latents, "a cat", fps=24.0, output_type="latent", generator=torch.Generator().manual_seed(5))

    ticks = clock()

    def hide(keys):
        frames = list(range(1, 1 + 3 * ticks.chunk))[-10:]
        own = 3 if ticks.chunk < 7 else 2
        line = [False] + [frame < 13 for frame in frames] + [False] * own
        if ticks.chunk < 4 or keys != COUNT * len(line):
            return None
        return torch.tensor([flag and token in TOKENS for flag in line for token in range(COUNT)])

    with ticks.on(pipe), watched(hide):
        expected = run(pipe)
    assert_exact(pipe, run, ForcedPolicy(plan), expected)


def test_observing_changes_nothing(pipe):
    records = observed(pipe, tiny.run)
    assert [record.start for record in records] == list(range(1, 22, 3))
    assert [record.phases for record in records] == [{"first": 1, "refine": 2, "commit": 1}] * 7
    assert [record.severity is None for record in records] == [True] + [False] * 6


def test_both_ways_in_and_nothing_else(pipe):
    for model in (pipe, pipe.transformer):
        assert [found.adapter for found in tokentrim.detect(model) if found.matches] == ["sana-wm"]


def test_a_commit_window(pipe):
    """A capture reads the newest three frames, its own, alone; with the sink where that is kept."""
    calls, hidden = [], []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, given: calls.append(given["kv_cache_mode"]), with_kwargs=True
    )

    def hide(keys):
        if calls[-1] != "inject_and_capture_post_rope" or keys % COUNT:
            return None
        hidden.append(keys // COUNT - 4)
        return torch.tensor([token >= COUNT and token < keys - 3 * COUNT for token in range(keys)])

    with watched(hide):
        expected = tiny.run(pipe)
    hook.remove()
    assert max(hidden) == tiny.HISTORY
    with tokentrim.patched(pipe, tokentrim.CommitWindow(3, anchors=True)):
        ours = tiny.run(pipe)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (ours - tiny.run(pipe)).abs().max() > 1e-4


def test_latent_moments_by_hand(pipe):
    """x0 of a chunk's last step, moved halfway to the first chunk's mean and deviation per channel."""
    first, ticks = [], clock()

    def correct(_module, _args, given, output):
        sigma = given["timestep"].float()[..., None] / 1000
        if given["kv_cache_mode"] != "inject" or abs(float(sigma[0, 0]) - 0.421875) > 1e-4:
            return None
        x0 = (given["hidden_states"].double() - sigma.double() * output[0].double())[0]
        mean, std = x0.mean(0), x0.std(0, correction=0)
        if not first:
            first.extend([mean, std])
            return None
        moved = (x0 - mean) / std * (std + 0.5 * (first[1] - std)) + mean + 0.5 * (first[0] - mean)
        return (((given["hidden_states"].double()[0] - moved) / sigma[0].double()).float()[None],)

    hook = pipe.transformer.register_forward_hook(correct, with_kwargs=True)
    with ticks.on(pipe):
        expected = tiny.run(pipe)
    hook.remove()
    with tokentrim.patched(pipe, tokentrim.LatentMoments(0.5)) as handle:
        ours = tiny.run(pipe)
    assert {act["hook"] for record in handle.report for act in record.acts} == {"correct"}
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    assert (ours - tiny.run(pipe)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:tokentrim was patched in and the denoiser was called")
def test_what_stands_in_the_way_is_said(pipe):
    other = tiny.pipeline()
    assert_refuses_a_cache_and_parallelism(other, tiny.run, other.transformer.transformer_blocks[0].attn1)
    place = pipe.transformer.build_rotary_emb_for_absolute_positions
    early = place(1, [1, 2, 3], *tiny.GRID, torch.device("cpu"), 24.0)
    cache = type("Cache", (), {"get": lambda *_: None})()
    with tokentrim.patched(pipe), pytest.raises(tokentrim.UnsupportedContextError, match="made before the patch"):
        pipe.transformer(
            tiny.noise(1, 3 * COUNT, 4), tiny.noise(1, 5, 8), torch.zeros(1, 72), early, None, cache, "inject"
        )


class TestKit(AdapterConformance):
    """The conformance kit. Its sink is captured beside the calls: a key that no call has made."""

    adapter: type[Adapter] = SanaWM
    chunks, chunk_to_prune, late_chunk = 7, 2, 5
    tokens = (0, 5, 9)

    def make_model(self):
        return tiny.pipeline(kind=tiny.QuietRefiner)

    def run(self, model, seed):
        return tiny.run(model, seed)

    def reference(self, model, seed):
        return reference(model, {self.chunk_to_prune: self.tokens}, seed)

    def _halved(self, call, seed):
        model, calls = self.make_model(), []

        def halve(_module, _args, given, output):
            calls.append(given)
            if len(calls) - 1 != call:
                return None
            sigma, noisy = given["timestep"][..., None] / 1000, given["hidden_states"]
            return ((noisy - (noisy - sigma * output[0]) / 2) / sigma,)

        hook = model.transformer.register_forward_hook(halve, with_kwargs=True)
        latents = self.run(model, seed)
        hook.remove()
        return latents
