"""The real Causal-Forcing (its root, whose cache is Self-Forcing's): the same adapter, other schedules of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fork_checks
import pytest
import torch
from comparison import OTHERS, TOKENS, TOLERANCE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import noise_of
from masked_calls import Calls, following, moved
from masked_reference import Prune
from tiny_self_forcing import Repository, Setup, few_step_pipeline, self_forcing, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim

pytestmark = [pytest.mark.upstream, pytest.mark.checks("self-forcing", "exact")]
Record = Callable[[str, Any], None]


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with self_forcing("Causal-Forcing") as opened:
        yield opened


def compare(repository: Repository, setup: Setup, chunks: int, first: tuple[int, ...] = ()) -> Comparison:
    """``first`` is the schedule of the first chunk, where it has one of its own."""
    pipeline = few_step_pipeline(repository, setup)
    if first:
        pipeline.denoising_step_list_first_chunk = pipeline.scheduler.timesteps[[1000 - step for step in first]]

    def generate() -> Tensor:
        return pipeline.inference(noise_of(1, chunks * setup.block), ["a cat"], return_latents=True)[1]

    return Comparison(generate, pipeline, source_of(repository, pipeline), setup.spared())


CASES = {
    "global window": (Setup(), {4: [TOKENS]}),
    "local 9 sink 3, two prunes": (Setup(window=9, sink=3), {3: [TOKENS], 4: [OTHERS]}),
    "frame by frame, local 5 sink 1": (Setup(window=5, sink=1, block=1), {4: [TOKENS]}),
}


@pytest.mark.parametrize("name", CASES)
def test_prune_equals_masked_attention(repository: Repository, name: str, record_property: Record) -> None:
    setup, plan = CASES[name]
    comparison = compare(repository, setup, 6)
    ours, handle = comparison.patched(ForcedPolicy(plan))
    prunes = [Prune(chunk * setup.block, tokens) for chunk, tokens in plan.items()]
    comparison.exact(f"Causal-Forcing, {name}", record_property, ours, comparison.reference(prunes))
    assert pruned_at(handle) == sorted(plan)
    assert trace(handle) == [setup.trace()] * 6


SCHEDULES = {
    "first chunk of 4 steps, others of 1": ((1000, 750, 500, 250), (1000,)),
    "first chunk of 1 step, others of 3": ((999,), (1000, 750, 250)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_first_chunk_with_a_schedule_of_its_own(repository: Repository, name: str, record_property: Record) -> None:
    first, steps = SCHEDULES[name]
    comparison = compare(repository, Setup(window=9, steps=steps), 5, first)
    ours, handle = comparison.patched(ForcedPolicy({3: [TOKENS]}))
    comparison.exact(f"Causal-Forcing, {name}", record_property, ours, comparison.reference([Prune(9, [TOKENS])]))
    counts = [len(first), *[len(steps)] * 4]
    refine = [{"refine": count - 1} if count > 1 else {} for count in counts]
    assert trace(handle) == [{"first": 1, **more, "commit": 1} for more in refine]


@pytest.mark.parametrize("policy", [tokentrim.LatentMoments(0.35), tokentrim.LateMean(2)], ids=str)
@pytest.mark.parametrize("given", [0, 3], ids=["from noise", "from an image"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_chunk_is_corrected_at_its_own_last_step(
    repository: Repository, name: str, given: int, policy: Any, record_property: Record
) -> None:
    first, steps = SCHEDULES[name]
    pipeline = few_step_pipeline(repository, Setup(window=9, steps=steps))
    pipeline.denoising_step_list_first_chunk = pipeline.scheduler.timesteps[[1000 - step for step in first]]
    options = {"initial_latent": 0.5 * noise_of(1, given)} if given else {}
    source = source_of(repository, pipeline)

    def generate() -> Tensor:
        torch.manual_seed(0)
        return pipeline.inference(noise_of(1, 12), ["a cat"], return_latents=True, **options)[1].clone()

    # The measure is the scene's first chunk, also where that was handed in.
    opening = [options["initial_latent"]] if given else list[Tensor]()
    late: list[Tensor] = []

    def by_hand(calls: Calls, _arguments: Any, output: Any) -> Any:
        if calls.commit or calls.start < given:
            return None
        x0 = output[-1]
        late[:] = [*late, x0] if calls.step else [x0]
        if calls.step != len(first if calls.start == given else steps) - 1:
            return None
        if calls.start == given:
            # Whether the sampler goes on from x0 alone shows at the first commit.
            opening[:] = opening or [x0.clone()]
            return None
        if isinstance(policy, tokentrim.LateMean):
            return (output[0], torch.stack(late[-2:]).mean(0)) if len(late) > 1 else None
        return output[0], moved(x0, (1, 3, 4), opening[0], 0.35)

    plain = generate()
    with following(source, by_hand):
        expected = generate()
    with tokentrim.patched(pipeline, policy):
        ours = generate()
    effect, error = difference(expected, plain), difference(ours, expected)
    record_property("exact", (f"Causal-Forcing, {name}, {policy}", effect, error))
    only_ones = isinstance(policy, tokentrim.LateMean) and len(steps) == 1
    assert only_ones or effect > 30 * TOLERANCE
    assert error <= TOLERANCE and torch.equal(generate(), plain)


def test_what_every_fork_must_show(repository: Repository) -> None:
    comparison = compare(repository, Setup(window=9, sink=1), 5)
    fork_checks.detected(comparison, "self-forcing")
    fork_checks.neutral(comparison, chunks=5)
    fork_checks.replayed(comparison, chunk=3, block=3)
    fork_checks.restored(comparison, chunk=3)
    fork_checks.started_afresh(comparison, chunk=3, chunks=5)
