"""The real MAGI-1, patched: observing changes no bit, a prune equals the -inf reference and spares older chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import TOLERANCE, VISIBLE, difference, pruned_at, trace
from forced import ForcedPolicy
from magi1_reference import CHUNK_ROWS, MagiReference, Prune, spying
from magi1_tiny import LAYERS, TOKENS, Repository, Setup, magi1
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy
from tokentrim_hooks.testing.fingerprint import assert_same, fingerprint

pytestmark = [pytest.mark.upstream, pytest.mark.checks("magi-1", "exact")]
Record = Callable[[str, Any], None]

DEAD, OTHERS = (1, 6, 11), (0, 6, 15)
BASE, SINGLE, DISTILLED = Setup(), Setup(window=1, steps=4), Setup(passes=1)
PAIR, SHORT = Setup(window=2, steps=4), Setup(steps=4)
SETUPS = {
    "base, 4 chunks in flight": BASE,
    "base, 2 chunks in flight": PAIR,
    "base, one chunk after the other": SINGLE,
    "distilled, 4 chunks in flight": DISTILLED,
    "distilled, one chunk after the other": DISTILLED.but(window=1, steps=4),
    "base, flex ranges": SHORT.but(flex=True),
    "base, cp_ulysses of one, memory offloaded": SHORT.but(strategy="cp_ulysses", offload=True),
    "base, every chunk sees all before": SHORT.but(ranges=()),
    "base, clean chunks see two": SHORT.but(clean_range=2),
    "base, 2 chunks of video given": SHORT.but(prefix=4),
}


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with magi1() as opened:
        yield opened


@pytest.fixture(scope="module")
def unpatched(repository: Repository) -> Callable[[Setup], tuple[Any, Tensor]]:
    """A model and the latents that it samples by itself."""

    @functools.cache
    def sampled(setup: Setup) -> tuple[Any, Tensor]:
        dit = repository.build(setup)
        return dit, repository.sample(dit, setup)

    return sampled


@pytest.fixture(scope="module")
def references(repository: Repository, unpatched: Any) -> Callable[..., tuple[Tensor, Tensor, int]]:
    """Latents with dead keys masked by -inf, with dead keys left out, and how many the pruned chunk lost at most."""

    @functools.cache
    def sampled(setup: Setup, prunes: tuple[Prune, ...]) -> tuple[Tensor, Tensor, int]:
        dit, _ = unpatched(setup)
        with MagiReference(repository, dit, prunes) as masking:
            masked = repository.sample(dit, setup)
        with MagiReference(repository, dit, prunes, drop=True):
            dropped = repository.sample(dit, setup)
        return masked, dropped, max(dead for asker, _, dead in masking.masked if asker == prunes[0].chunk)

    return sampled


def steps(setup: Setup) -> list[dict[str, int]]:
    """Calls by phase, worked out from the schedule: a new chunk joins every ``steps / window`` steps."""
    stage = setup.steps // setup.window
    given = [{"first": 1}] if setup.prefix else []
    last = {"first": 1, "refine": setup.steps - 1}
    between = [{"first": 1, **({"refine": stage - 1} if stage > 1 else {})}] * (setup.chunks - 1)
    return [*given, *between, last]


# ------------------------------------------------------------------------------------------ doing nothing


@pytest.mark.parametrize("name", SETUPS)
def test_observing_changes_no_bit(repository: Repository, unpatched: Any, name: str) -> None:
    setup = SETUPS[name]
    dit, latents = unpatched(setup)
    assert latents.isfinite().all()
    random, before = torch.get_rng_state(), fingerprint(dit)
    with tokentrim.patch(dit, ObservePolicy()) as handle:
        observed = repository.sample(dit, setup)
    assert torch.equal(observed, latents)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(before, fingerprint(dit))
    assert trace(handle) == steps(setup)
    judged = [record.severity is not None for record in handle.report]
    assert judged == [False] + [True] * (len(judged) - 1)


def test_severity_is_the_drift_of_clean_estimates(repository: Repository, unpatched: Any) -> None:
    """Worked out here from what sampling itself saw: x + (1 - t) v of the newest two chunks, or the finished one."""
    for setup, chunk in ((BASE, 2), (SINGLE, 2), (SINGLE.but(prefix=1), 1)):  # the last: chunk 0 holds a given image
        dit, _ = unpatched(setup)
        with spying(type(dit)) as calls, tokentrim.patch(dit, ObservePolicy(fraction=1.0)) as handle:
            repository.sample(dit, setup)
        first = next(call for call in calls if call.options["range_num"] == chunk + 1)
        x, v, t = first.x[0], first.output[0], first.timestep[0].repeat_interleave(2)[:, None, None]
        clean = x + (1 - t) * v
        before = x[:, :2] if setup.window == 1 else clean[:, -4:-2]
        drift = (clean[:, -2:] - before).mean(1).unfold(1, 2, 2).unfold(2, 2, 2).square().sum((0, 3, 4)).sqrt()
        assert list(handle.report)[chunk].severity == pytest.approx(float(drift.mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------ pruning


PLANS = {name: {3: DEAD} for name in SETUPS} | {
    "base, 4 chunks in flight, two prunes": {2: DEAD, 4: OTHERS},
    "base, 4 chunks in flight, prune the second chunk": {1: DEAD},
    "base, one chunk after the other, in succession": {2: DEAD, 3: OTHERS},
    "distilled, 4 chunks in flight, 7 chunks": {3: DEAD, 5: OTHERS},
}
LONG = {
    "base, 4 chunks in flight, two prunes": SHORT,
    "base, 4 chunks in flight, prune the second chunk": SHORT,
    "base, one chunk after the other, in succession": SINGLE,
    "distilled, 4 chunks in flight, 7 chunks": DISTILLED.but(chunks=7, steps=4),
}


@pytest.mark.parametrize("name", PLANS)
def test_prune_equals_masked_attention(
    repository: Repository, unpatched: Any, references: Any, name: str, record_property: Record
) -> None:
    setup, plan = {**SETUPS, **LONG}[name], PLANS[name]
    dit, latents = unpatched(setup)
    given = setup.prefix // 2
    prunes = [Prune(chunk + given, tokens) for chunk, tokens in plan.items()]
    plain = setup.but(flex=False, strategy="none", offload=False)
    reference, dropping, most = references(plain, tuple(prunes))
    numbers = {chunk + (1 if given else 0): [tokens] for chunk, tokens in plan.items()}  # what is given counts as one
    with tokentrim.patch(dit, ForcedPolicy(numbers)) as handle:
        ours = repository.sample(dit, setup)
    scale = float(latents.std())
    effect, error = difference(reference, latents) / scale, difference(ours, reference) / scale
    print(f"MAGI-1 {name:<58} effect {effect:.2e} error {error:.1e}")
    record_property("exact", (f"MAGI-1 {name}", effect, error))
    assert effect > VISIBLE and error <= TOLERANCE
    assert torch.equal(ours, dropping)
    assert pruned_at(handle) == sorted(numbers)
    assert next(record.dead for record in handle.report if record.pruned) == most
    assert trace(handle) == steps(setup)


@pytest.mark.parametrize("setup", [BASE, DISTILLED], ids=["base", "distilled"])
def test_rows_that_reach_the_kernel(repository: Repository, unpatched: Any, setup: Setup) -> None:
    """Key rows of the newest chunk before and after the prune; of every other chunk as before."""
    dit, _ = unpatched(setup)
    kernel, lengths = repository.layers.flash_attn_func, []

    def counting(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        lengths.append(k.shape[1])
        return kernel(q, k, v, **options)

    calls: list[list[int]] = []
    with (
        mock.patch.object(repository.layers, "flash_attn_func", counting),
        spying(type(dit), lengths.clear) as seen,
        tokentrim.patch(dit, ForcedPolicy({3: [DEAD]})),
    ):
        seen.listeners.append(lambda: calls.append(list(lengths)))
        repository.sample(dit, setup)
    first = next(i for i, call in enumerate(seen) if call.options["range_num"] == 4)
    rows = [CHUNK_ROWS * chunks for chunks in (1, 2, 3, 4)]
    copied = [CHUNK_ROWS] if setup is DISTILLED else []
    alone = [CHUNK_ROWS] * LAYERS if setup is BASE else []
    assert seen[first].options["distill_nearly_clean_chunk"]  # distilled: the oldest chunk once more, without context
    passes = LAYERS * (2 if setup is BASE else 1)
    assert calls[first] == [*rows, *copied] * passes + alone
    assert calls[first + 1] == calls[first], "the proof that calls can be repeated prunes nothing"
    assert calls[first + 2] == [*rows[:3], rows[3] - 3 * 2 * len(DEAD), *copied] * passes + alone


@pytest.mark.parametrize("setup", [BASE, DISTILLED], ids=["base", "distilled"])
def test_older_chunks_are_untouched_by_a_prune(repository: Repository, unpatched: Any, setup: Setup) -> None:
    dit, _ = unpatched(setup)
    with spying(type(dit)) as calls, tokentrim.patch(dit, ForcedPolicy({4: [DEAD]})):
        repository.sample(dit, setup)
    first, _proof, again = [call for call in calls if call.options["range_num"] == 5][:3]
    assert first.options == again.options and torch.equal(first.x, again.x)
    assert first.options["fwd_extra_1st_chunk"] and first.x.shape[2] == 10
    assert torch.equal(first.output[:, :, :-2], again.output[:, :, :-2])
    assert difference(first.output[:, :, -2:], again.output[:, :, -2:]) > VISIBLE


@pytest.mark.parametrize("setup", [SINGLE, PAIR, PAIR.but(passes=1)], ids=["one by one", "base", "distilled"])
def test_poison_at_pruned_positions_is_not_read(repository: Repository, unpatched: Any, setup: Setup) -> None:
    """Garbage in the KV memory before the regeneration, at the pruned positions of a chunk only the newest one sees."""
    dit, _ = unpatched(setup)

    def regenerated(poison: float | None, tokens: tuple[int, ...]) -> Tensor:
        # Chunk 3's prune comes with the proof that calls can be repeated, which must not meet the poison.
        plan = {3: [DEAD], 4: [DEAD]}
        with spying(type(dit)) as calls, tokentrim.patch(dit, Poisoner(plan, poison, tokens, calls)):
            repository.sample(dit, setup)
        return [call for call in calls if call.options["range_num"] == 5][1].output[:, :, -2:]

    clean = regenerated(None, DEAD)
    assert torch.equal(regenerated(1e4, DEAD), clean)
    assert difference(regenerated(1e4, (2,)), clean) > VISIBLE


class Poisoner(ForcedPolicy):
    """Overwrites rows of the memory of the latest call while it judges chunk 4, before that is regenerated."""

    def __init__(self, plan: Any, poison: float | None, tokens: tuple[int, ...], calls: list[Any]) -> None:
        super().__init__(plan)
        vars(self).update(poison=poison, positions=tokens, calls=calls)  # policies are frozen

    def judge(self, chunk: tokentrim.Chunk, history: Any) -> Any:
        if chunk.index == 4 and self.poison is not None:
            call = self.calls[-1]
            assert call.options["slice_point"] > 0
            rows = [frame + token for frame in range(0, CHUNK_ROWS, TOKENS) for token in self.positions]
            for memory in call.memory.key_value_memory_dict.values():
                memory[rows] = self.poison
            vars(self).update(poison=None)
        return super().judge(chunk, history)


# ------------------------------------------------------------------------------------------ hiding


@dataclass(frozen=True)
class HidesOld(tokentrim.Policy):
    """Hides tokens of all finished frames from the calls of chunk 2 and later ones."""

    def hide(self, chunk: Any, context: Any) -> Any:
        mask = torch.zeros(context.frames, context.tokens, dtype=torch.bool)
        mask[:, list(DEAD)] = True
        return mask if chunk.index >= 2 else None


class HidingReference(MagiReference):
    """Dead are finished chunks' tokens in calls whose newest chunk is 2 or later, but to their own queries."""

    def _is_dead(self, asker: int, chunk: int, token: int) -> bool:
        return max(self._chunks) >= 2 and chunk < asker and token in DEAD


def test_hiding_equals_masked_attention(repository: Repository, unpatched: Any, record_property: Record) -> None:
    dit, latents = unpatched(SINGLE)
    with HidingReference(repository, dit, ()) as masking:
        expected = repository.sample(dit, SINGLE)
    assert masking.masked
    with tokentrim.patch(dit, HidesOld()) as handle:
        ours = repository.sample(dit, SINGLE)
    # Relative to the largest value (about 15), as in the kit.
    largest = float(expected.abs().max())
    effect, error = difference(expected, latents) / largest, difference(ours, expected) / largest
    record_property("exact", ("MAGI-1, hidden, one chunk after the other", effect, error))
    assert effect > VISIBLE and error <= TOLERANCE
    assert any(act["hook"] == "hide" for record in handle.report for act in record.acts)
    assert torch.equal(repository.sample(dit, SINGLE), latents)
