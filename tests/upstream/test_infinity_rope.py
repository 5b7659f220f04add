"""The real Infinity-RoPE: K before RoPE, scenes that flush the cache, with and without a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fork_checks
import pytest
from comparison import OTHERS, TOKENS, Comparison, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_reference import Prune
from tiny_forks import scenes_pipeline, small_scenes
from tiny_self_forcing import Repository, Setup, self_forcing, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy

pytestmark = [pytest.mark.upstream, pytest.mark.checks("infinity-rope", "exact")]
Record = Callable[[str, Any], None]

SCENES = "a cat [3s] | a dog [3s]"
"""Two scenes of three chunks."""
CUT = "a cat [3s#] | a dog [3s]"


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with self_forcing("infinity-rope") as opened, small_scenes(opened):
        yield opened


def compare(repository: Repository, setup: Setup, chunks: int, prompt: str = "a cat [99s]") -> Comparison:
    pipeline = scenes_pipeline(repository, setup)

    def generate() -> Tensor:
        return pipeline.inference(noise_of(1, chunks * setup.block), [prompt], return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), setup.spared())


USUAL = Setup(window=6, sink=1)
"""As in upstream's configuration."""

CASES = {
    "window 6 sink 1, before eviction": (USUAL, 4, {1: [TOKENS]}, "a cat [99s]", {}),
    "window 6 sink 1, after eviction": (USUAL, 6, {3: [TOKENS], 4: [OTHERS]}, "a cat [99s]", {}),
    "window 9 sink 0": (Setup(window=9), 6, {4: [TOKENS]}, "a cat [99s]", {}),
    "marks go through a change of scene": (USUAL, 6, {2: [TOKENS]}, SCENES, {}),
    "marks go through a cut": (USUAL, 6, {2: [TOKENS]}, CUT, {}),
    "first chunk of a scene": (USUAL, 6, {3: [TOKENS]}, SCENES, {}),
    "first chunk after a cut, sink pruned": (USUAL, 6, {3: [TOKENS]}, CUT, {"prune_anchors": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_prune_equals_masked_attention(repository: Repository, name: str, record_property: Record) -> None:
    setup, chunks, plan, prompt, options = CASES[name]
    comparison = compare(repository, setup, chunks, prompt)
    ours, handle = comparison.patched(ForcedPolicy(plan, **options))
    prunes = [Prune(chunk * setup.block, tokens) for chunk, tokens in plan.items()]
    reference = comparison.reference(prunes, **({"spared": ()} if options else {}))
    comparison.exact(f"Infinity-RoPE, {name}", record_property, ours, reference)
    assert pruned_at(handle) == sorted(plan)
    assert trace(handle) == [setup.trace()] * chunks


def test_scenes_were_flushed(repository: Repository) -> None:
    """Three frames are left of the window when the second scene begins."""
    comparison = compare(repository, USUAL, 6, SCENES)
    ends: list[int] = []
    hook = comparison.model.generator.register_forward_pre_hook(
        lambda _m, _a, kwargs: ends.append(int(kwargs["kv_cache"][0]["local_end_index"])), with_kwargs=True
    )
    comparison.run()
    hook.remove()
    assert ends[::3] == [0, 240, 480, 240, 480, 480]


@pytest.mark.parametrize(("prompt", "fresh"), [(SCENES, [0, 1, 3]), (CUT, [0, 1, 3]), ("a cat [99s]", [0, 1])])
def test_statistics_start_anew_with_a_scene(repository: Repository, prompt: str, fresh: list[int]) -> None:
    comparison = compare(repository, USUAL, 6, prompt)
    with tokentrim.patch(comparison.model, ObservePolicy()) as handle:
        comparison.run()
    assert [record.chunk for record in handle.report if record.mean is None] == fresh
    assert [record.chunk for record in handle.report if record.severity is None] == [0]


def test_what_every_fork_must_show(repository: Repository) -> None:
    comparison = compare(repository, USUAL, 5, SCENES)
    fork_checks.detected(comparison, "infinity-rope")
    fork_checks.neutral(comparison, chunks=5)
    fork_checks.replayed(comparison, chunk=3, block=3)
    fork_checks.restored(comparison, chunk=3)
    fork_checks.started_afresh(comparison, chunk=3, chunks=5)
