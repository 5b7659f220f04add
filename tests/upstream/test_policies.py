"""Policies that hide, correct and settle, on the real models with a KV cache: against the same by hand, unpatched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_causvid
import tiny_forks
import tiny_longlive
import tiny_memflow
import tiny_memrope
import tiny_rolling_forcing
import torch
from comparison import TOLERANCE, difference
from harness import noise_of
from masked_calls import Calls, commit_window, flowmo, following, hiding, latent_moments, row_moments, weighing
from masked_reference import Source
from tiny_self_forcing import Setup, few_step_pipeline, self_forcing, source_of
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import UnsupportedPolicyError

pytestmark = pytest.mark.upstream
Record = Callable[[str, Any], None]
SEEN = 30 * TOLERANCE
PROMPTS = ["a cat", "a dog by the sea"]


@dataclass
class Rig:
    """A pipeline, its loop, and what references must know of it."""

    model: Any
    generate: Callable[[], Tensor]
    source: Source
    sink: int
    steps: int = 2
    window: int = 0
    """Frames of a window beside which the kernel sees a bank of older frames; 0 where there is none."""
    memory: tuple[int, int] = (0, 0)
    """(Frames of memory behind the sink that are kept as it is, the frame from which on they are there)."""

    def run(self) -> Tensor:
        """A video from a known random stream."""
        torch.manual_seed(0)
        with torch.no_grad():
            return self.generate().clone()

    def patched(self, policies: Any) -> tuple[Tensor, Any]:
        """The patched loop; afterwards every cache is whole, and the loop as before."""
        with tokentrim.patch(self.model, policies) as handle:
            video = self.run()
        return video, handle


def like_self_forcing(name: str, make: Any, setup: Setup, batch: int = 1, chunks: int = 5) -> Any:
    """Rigs of the forks whose loop is Self-Forcing's."""

    @contextmanager
    def rig() -> Iterator[Rig]:
        with self_forcing(name) if name != "realtime-video" else tiny_forks.krea() as repository, ExitStack() as more:
            if name == "infinity-rope":
                more.enter_context(tiny_forks.small_scenes(repository))
            pipeline = make(repository, setup)
            prompts = ["a cat [99s]"] if name == "infinity-rope" else PROMPTS[: setup.batch]
            noise = noise_of(setup.batch, chunks * 3)

            def generate() -> Tensor:
                return pipeline.inference(noise, prompts, return_latents=True)[1]

            yield Rig(pipeline, generate, source_of(repository, pipeline), setup.sink)

    return rig


@contextmanager
def causvid() -> Iterator[Rig]:
    with tiny_causvid.causvid() as repository:
        setup = tiny_causvid.Setup()
        pipeline = tiny_causvid.pipeline_of(repository, setup)

        def generate() -> Tensor:
            return pipeline.inference(noise_of(1, 15), PROMPTS[:1], return_latents=True)[1]

        yield Rig(pipeline, generate, source_of(repository, pipeline), 0, 3)


@contextmanager
def longlive(infinite: bool = False) -> Iterator[Rig]:
    with tiny_longlive.longlive(infinite) as repository:
        setup = Setup(window=9, sink=3, batch=1 if infinite else 2)
        pipeline = tiny_longlive.longlive_pipeline(repository, setup, infinite)

        def generate() -> Tensor:
            return pipeline.inference(noise_of(setup.batch, 15), PROMPTS[: setup.batch], return_latents=True)[1]

        yield Rig(pipeline, generate, source_of(repository, pipeline), 3)


@contextmanager
def longlive_infinite() -> Iterator[Rig]:
    with longlive(True) as rig:
        yield rig


@contextmanager
def rolling() -> Iterator[Rig]:
    with tiny_rolling_forcing.rolling_forcing() as repository:
        pipeline = tiny_rolling_forcing.rolling_pipeline(repository)

        def generate() -> Tensor:
            return pipeline.inference_rolling_forcing(noise_of(1, 21), PROMPTS[:1], return_latents=True)[1]

        yield Rig(pipeline, generate, tiny_rolling_forcing.source_of(repository, pipeline), 3)


@contextmanager
def memflow() -> Iterator[Rig]:
    with tiny_memflow.small_frames() as repository:
        tokens = tiny_memflow.SMALL
        pipeline = tiny_memflow.memflow_pipeline(repository, tokens=tokens)

        def generate() -> Tensor:
            return pipeline.inference(noise_of(1, 15), PROMPTS[:1], return_latents=True)[1]

        source = tiny_memflow.memflow_source(repository, pipeline, tokens)
        yield Rig(pipeline, generate, source, 1, window=tiny_memflow.SETUP.window)


@contextmanager
def memrope() -> Iterator[Rig]:
    with tiny_memrope.memrope() as repository:
        pipeline = tiny_memrope.memrope_pipeline(repository, "ema")

        def generate() -> Tensor:
            return pipeline.inference(noise_of(1, 18), PROMPTS[:1], return_latents=True)[1]

        yield Rig(pipeline, generate, source_of(repository, pipeline), 3, memory=(2, 12))


RIGS = {
    "self-forcing": like_self_forcing("Self-Forcing", few_step_pipeline, Setup(window=9, sink=3, batch=2)),
    "self-forcing, global window": like_self_forcing("Self-Forcing", few_step_pipeline, Setup()),
    "causal-forcing": like_self_forcing("Causal-Forcing", few_step_pipeline, Setup(window=9, sink=1)),
    "infinity-rope": like_self_forcing("infinity-rope", tiny_forks.scenes_pipeline, Setup(window=9, sink=1)),
    "reward-forcing": like_self_forcing("Reward-Forcing", tiny_forks.rewarded_pipeline, Setup(window=9, sink=3)),
    "krea": like_self_forcing("realtime-video", tiny_forks.krea_pipeline, Setup(window=9, sink=3)),
    "causvid": causvid,
    "longlive": longlive,
    "longlive, infinite": longlive_infinite,
    "rolling-forcing": rolling,
    "memflow": memflow,
    "memrope": memrope,
    "rolling-sink": like_self_forcing("RollingSink", tiny_forks.rolling_sink_pipeline, Setup(window=9)),
}


@pytest.fixture(scope="module", params=RIGS)
def rig(request: Any) -> Iterator[tuple[str, Rig, Tensor]]:
    """A rig, and what it makes unpatched."""
    with RIGS[request.param]() as made:
        yield request.param, made, made.run()


def adapter_of(rig: Rig) -> Any:
    """The adapter that recognises the rig's pipeline."""
    name = next(found.adapter for found in tokentrim.detect(rig.model) if found.matches)
    return next(info.adapter for info in tokentrim.adapters() if info.name == name)


@pytest.fixture(autouse=True)
def recorded(request: Any, rig: Any, record_property: Record) -> None:
    """For the records: the column of docs/models.md that a test fills (``tools/record_checks.py``)."""
    test, adapter = request.node.originalname, adapter_of(rig[1])
    column = COLUMNS.get(test)
    if column in adapter.takes or column == "neutral":
        record_property("checks", (adapter.name, "tests/upstream/test_policies.py", column, request.node.name))


COLUMNS = {
    "test_a_commit_window_equals_minus_infinity": "hide",
    "test_tokens_hidden_from_any_call_equal_minus_infinity": "hide",
    "test_soft_prune_equals_attention_written_out": "weigh",
    "test_latent_moments_equal_a_calculation_by_hand": "correct",
    "test_row_moments_equal_a_calculation_by_hand": "settle",
    "test_flowmo_equals_a_calculation_by_hand": "guide",
    "test_no_answer_changes_no_bit": "neutral",
}


def require(rig: Rig, *needs: str) -> None:
    """Skip where the adapter declares that it does not take these: then it refuses, which another test shows."""
    adapter = adapter_of(rig)
    lacking = set(needs) - adapter.takes
    if lacking:
        pytest.skip(f"{adapter.name} declares no {', '.join(sorted(lacking))}")


def exact(name: str, rig: tuple[str, Rig, Tensor], record: Record, ours: Tensor, expected: Tensor) -> None:
    """Ours is the reference and is not the plain video, and the model is whole again."""
    plain = rig[2]
    effect, error = difference(expected, plain), difference(ours, expected)
    print(f"{rig[0]}, {name}: effect {effect:.1e}, error {error:.1e}")
    record("exact", (f"{rig[0]}, {name}", effect, error))
    assert effect > SEEN
    assert error <= TOLERANCE
    assert torch.equal(rig[1].run(), plain)


@pytest.mark.parametrize(("frames", "anchors"), [(6, False), (0, False), (4, True)])
def test_a_commit_window_equals_minus_infinity(rig: Any, frames: int, anchors: bool, record_property: Record) -> None:
    _, made, _ = rig
    require(made, "hide", "commit")

    def dead(calls: Calls, context: int, own: int) -> Tensor | None:
        bank = max(context - min(calls.start, made.window - own), 0) if made.window else 0
        sink = made.sink + (made.memory[0] if calls.start >= made.memory[1] else 0)
        return commit_window(frames, sink, anchors, made.source.tokens, bank)(calls, context, own)

    with hiding(made.source, dead) as hidden:
        expected = made.run()
    assert sum(hidden)
    ours, handle = made.patched(tokentrim.CommitWindow(frames, anchors=anchors))
    assert any(act["hook"] == "hide" for chunk in handle.report for act in chunk.acts)
    exact(f"CommitWindow({frames}, anchors={anchors})", rig, record_property, ours, expected)


@dataclass(frozen=True)
class HideSome(tokentrim.Policy):
    """Hides random tokens of the two newest finished frames from every call of some phases, others per sample."""

    phases: tuple[str, ...] = ("first", "refine", "commit")
    batch: int = 1

    def hide(self, chunk: Any, context: Any) -> Any:
        if chunk.phase not in self.phases or context.frames < 2:
            return None
        mask = torch.zeros(self.batch, context.frames, context.tokens, dtype=torch.bool)
        mask[:, -2:] = some(chunk.phase, self.batch, context.tokens)
        return mask


def some(phase: str, batch: int, tokens: int) -> Tensor:
    rng = torch.Generator().manual_seed(len(phase))
    return torch.rand(batch, 2, tokens, generator=rng) < 0.4


@pytest.mark.parametrize("phases", [("first",), ("refine",), ("commit",), ("first", "refine", "commit")])
def test_tokens_hidden_from_any_call_equal_minus_infinity(
    rig: Any, phases: tuple[str, ...], record_property: Record
) -> None:
    name, made, plain = rig
    require(made, "hide", *(["commit"] if "commit" in phases else []))
    if name in ("reward-forcing", "memrope") and "first" in phases:
        with pytest.raises(UnsupportedPolicyError, match="HideSome hides rows from a 'first' call"):
            made.patched(HideSome(phases, plain.shape[0]))
        return
    batch, tokens, ends = plain.shape[0], made.source.tokens, dict[int, int]()

    def dead(calls: Calls, context: int, own: int) -> Tensor | None:
        phase = calls.phase
        if name == "rolling-forcing" and not calls.commit:
            # One call a window: the last windows take no new block in.
            ends[calls.start] = calls.start + own
            enters = all(end < calls.start + own for start, end in ends.items() if start < calls.start)
            phase = "first" if enters else "refine"
        if phase not in phases or context < 2:
            return None
        old = torch.zeros(batch, context - 2, tokens, dtype=torch.bool)
        return torch.cat([old, some(phase, batch, tokens)], dim=1).flatten(1)

    with hiding(made.source, dead) as hidden:
        expected = made.run()
    assert sum(hidden)
    ours, _ = made.patched(HideSome(phases, batch))
    exact(f"tokens hidden from {', '.join(phases)}", rig, record_property, ours, expected)


@pytest.mark.parametrize(("weight", "keep", "anchors"), [(0.5, 1, False), (0.1, 0, True)])
def test_soft_prune_equals_attention_written_out(
    rig: Any, weight: float, keep: int, anchors: bool, record_property: Record
) -> None:
    _, made, _ = rig
    require(made, "weigh")
    with weighing(made.source, weight, keep, made.sink, anchors) as weighed:
        expected = made.run()
    assert weighed
    ours, handle = made.patched(tokentrim.SoftPrune(weight, keep, anchors))
    assert any(act["hook"] == "hide" for chunk in handle.report for act in chunk.acts)
    exact(f"SoftPrune({weight}, keep={keep}, anchors={anchors})", rig, record_property, ours, expected)


def test_latent_moments_equal_a_calculation_by_hand(rig: Any, record_property: Record) -> None:
    _, made, _ = rig
    require(made, "correct")
    with following(made.source, latent_moments(0.35, made.steps)):
        expected = made.run()
    ours, handle = made.patched(tokentrim.LatentMoments(0.35))
    assert {act["hook"] for chunk in handle.report for act in chunk.acts} == {"correct"}
    exact("LatentMoments(0.35)", rig, record_property, ours, expected)


@pytest.mark.parametrize("of", [("v",), ("k", "v")])
def test_row_moments_equal_a_calculation_by_hand(rig: Any, of: tuple[str, ...], record_property: Record) -> None:
    _, made, _ = rig
    require(made, "settle")
    with following(made.source, row_moments(0.35, of)):
        expected = made.run()
    ours, handle = made.patched(tokentrim.RowMoments(0.35, of=of))
    assert {act["hook"] for chunk in handle.report for act in chunk.acts} == {"settle"}
    exact(f"RowMoments(0.35, of={of})", rig, record_property, ours, expected)


@pytest.mark.parametrize("policy", [tokentrim.FlowMo(), tokentrim.FlowMo(step=20.0, optimiser="descent")], ids=str)
def test_flowmo_equals_a_calculation_by_hand(rig: Any, policy: Any, record_property: Record) -> None:
    _, made, _ = rig
    require(made, "guide")
    with flowmo(made.source, policy.step, policy.optimiser == "adam") as guided:
        expected = made.run()
    assert guided == [0]
    ours, handle = made.patched(policy)
    acts = {(chunk.chunk, act["hook"], act["calls"]) for chunk in handle.report for act in chunk.acts}
    assert acts == {(0, "guide", 1)}
    exact(str(policy), rig, record_property, ours, expected)


@dataclass(frozen=True)
class Looks(tokentrim.Policy):
    """Looks ahead before every call, and answers nothing."""

    def guide(self, chunk: Any) -> None:
        with torch.enable_grad():
            latents = chunk.latents.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(chunk.predict(latents).sum(), latents)
        assert bool(torch.isfinite(slope).all()) and float(slope.norm()) > 0


def test_no_answer_changes_no_bit(rig: Any) -> None:
    _, made, plain = rig
    state = torch.get_rng_state()
    policies = [HideSome(phases=()), tokentrim.LatentMoments(0.0), tokentrim.RowMoments(0.0), Looks()]
    takes = adapter_of(made).takes
    ours, handle = made.patched([policy for policy in policies if policy.needs <= takes])
    assert torch.equal(ours, plain) and torch.equal(torch.get_rng_state(), state)
    assert not any(chunk.acts for chunk in handle.report)
