"""The node pack (examples/comfyui) on ComfyUI's own AR model, sampler, guider and model patcher, on a CPU.

What is applied to a MODEL by the node is compared with ComfyUI's own, unpatched loop with -inf at the dead keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import TOLERANCE, VISIBLE, difference
from forced import ForcedPolicy
from masked_reference import MaskedReference, Prune, WeighedReference
from tiny_comfyui import TOKENS, Comfy, Setup, comfyui, model_of, source_of, video
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import LateMean, ObservePolicy, SoftPrune
from tokentrim_hooks.testing.fingerprint import assert_same, fingerprint

pytestmark = [pytest.mark.upstream, pytest.mark.checks("comfyui-ar", "exact")]
Record = Callable[[str, Any], None]
DEAD, OTHERS = (0, 5, 11, 20), (3, 5, 17, 23)


@pytest.fixture(scope="module", params=[False, True], ids=["ComfyUI's kernel", "torch's kernel"])
def comfy(request: Any) -> Iterator[Comfy]:
    with comfyui(torch_kernel=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(comfy: Comfy) -> Any:
    """The cached MODEL that all clones of this module come from, loaded once: every test leaves it as it was."""
    made = model_of(comfy)
    video(comfy, made, Setup(frames=2))
    return made


@pytest.fixture(autouse=True)
def the_cached_model_stays_as_it_was(comfy: Comfy, model: Any) -> Iterator[None]:
    before, kernel, options = fingerprint(model.model), comfy.ar_model.optimized_attention, repr(model.model_options)
    yield
    assert_same(before, fingerprint(model.model), {"current_patcher"})
    assert comfy.ar_model.optimized_attention is kernel and repr(model.model_options) == options
    assert not model.attachments and not any(model.wrappers.values())


def applied(model: Any, policy: Any, probe: str = "first-step") -> Any:
    return sys.modules["tokentrim_pack.tokentrim_comfyui.sampling"].applied(model, policy, probe)


def reports(clone: Any) -> list[Any]:
    return [report for _, report in clone.get_attachment("tokentrim").reports]


def masked(comfy: Comfy, model: Any, setup: Setup, plan: dict[int, Any], **options: Any) -> Tensor:
    """ComfyUI's own loop, -inf at the keys of the tokens that ``plan`` names, from the start of each chunk on."""
    lasting = options.pop("lasting", True)
    prunes = [Prune(setup.image + (chunk - bool(setup.image)) * setup.block, t, lasting) for chunk, t in plan.items()]
    with source_of(comfy, model) as source, MaskedReference(source, prunes, **options) as reference:
        latents = video(comfy, model, setup)
    assert any(any(counts) for counts in reference.masked)
    return latents


CASES: dict[str, tuple[Setup, dict[int, Any], dict[str, Any]]] = {
    "prune at chunk 4": (Setup(), {4: [DEAD]}, {}),
    "two prunes in a row": (Setup(), {2: [DEAD], 3: [OTHERS]}, {}),
    "frame by frame, two videos, different tokens": (Setup(6, 1, 2), {2: [DEAD, ()], 4: [OTHERS, DEAD]}, {}),
    "a given image": (Setup(frames=9, image=1), {3: [DEAD]}, {}),
    "a last chunk of one frame": (Setup(frames=7, block=2), {3: [DEAD]}, {}),
    "the finished chunk is judged": (Setup(), {4: [DEAD]}, {"probe": "candidate"}),
}


@pytest.mark.parametrize("name", CASES)
def test_prune_equals_masked_attention(comfy: Comfy, model: Any, name: str, record_property: Record) -> None:
    setup, plan, options = CASES[name]
    clone = applied(model, ForcedPolicy(plan), **options)
    ours, reference = video(comfy, clone, setup), masked(comfy, model, setup, plan)
    effect, error = difference(reference, video(comfy, model, setup)), difference(ours, reference)
    print(f"ComfyUI {comfy.version}, {name:<46} effect {effect:.2e} error {error:.1e}")
    record_property("exact", (name, effect, error))
    assert effect > VISIBLE and error <= TOLERANCE
    (report,) = reports(clone)
    assert sorted({record.chunk for record in report if record.pruned}) == sorted(plan)
    given = [{"first": 1}] if setup.image else []
    chunks = len({record.chunk for record in report if record.sample == 0}) - len(given)
    calls = {"first": 1, "refine": len(setup.steps) - 2, "commit": 1}
    assert [record.phases for record in report if record.sample == 0] == given + [calls] * chunks


def test_a_replay_is_bit_identical_to_pruning_before_the_chunk(comfy: Comfy, model: Any) -> None:
    ours = video(comfy, applied(model, ForcedPolicy({4: [DEAD]})), Setup())
    assert torch.equal(ours, masked(comfy, model, Setup(), {4: [DEAD]}, drop=True))


def test_tokens_come_back_without_persist(comfy: Comfy, model: Any) -> None:
    plan = {3: [DEAD], 4: [OTHERS]}
    ours = video(comfy, applied(model, ForcedPolicy(plan, persist=False)), Setup())
    assert difference(ours, masked(comfy, model, Setup(), plan, lasting=False)) <= TOLERANCE


@pytest.mark.checks("comfyui-ar", "neutral")
@pytest.mark.parametrize("probe", ["first-step", "candidate"])
def test_observing_is_bit_identical(comfy: Comfy, model: Any, probe: str) -> None:
    expected, state = video(comfy, model, Setup()), torch.get_rng_state()
    clone = applied(model, ObservePolicy(), probe)
    assert torch.equal(video(comfy, clone, Setup()), expected) and torch.equal(torch.get_rng_state(), state)
    assert [record.severity is not None for record in reports(clone)[0]] == [False] + [True] * 5


@pytest.mark.checks("comfyui-ar", "undone")
def test_the_cached_model_samples_as_before_and_after(comfy: Comfy, model: Any) -> None:
    """Before the clone, after it, and when the clone is gone."""
    expected = video(comfy, model, Setup())
    clone = applied(model, ForcedPolicy({2: [DEAD]}))
    pruned = video(comfy, clone, Setup())
    assert difference(pruned, expected) > VISIBLE
    assert torch.equal(video(comfy, model, Setup()), expected)
    del clone
    assert torch.equal(video(comfy, model, Setup()), expected)


def test_two_clones_have_each_its_policy(comfy: Comfy, model: Any) -> None:
    plans = ({2: [DEAD]}, {3: [OTHERS]})
    clones = [applied(model, ForcedPolicy(plan)) for plan in plans]
    found = [[video(comfy, clone, Setup()) for clone in clones] for _ in range(2)]
    for plan, once, again in zip(plans, *found, strict=True):
        assert torch.equal(once, again) and torch.equal(once, masked(comfy, model, Setup(), plan, drop=True))
    assert [[r.triggers for r in reports(clone)] for clone in clones] == [[1, 1], [1, 1]]


def test_nodes_in_a_row_act_together(comfy: Comfy, model: Any) -> None:
    both = video(comfy, applied(applied(model, LateMean(2)), ForcedPolicy({2: [DEAD]})), Setup())
    either = [video(comfy, applied(model, policy), Setup()) for policy in (LateMean(2), ForcedPolicy({2: [DEAD]}))]
    assert all(difference(both, one) > VISIBLE for one in either)
    with pytest.raises(ValueError, match="two policies judge"):
        applied(applied(model, ForcedPolicy({})), ObservePolicy())


@pytest.mark.parametrize("call", [4, 10, 17])
def test_an_interrupt_leaves_nothing(comfy: Comfy, model: Any, call: int) -> None:
    """The button in the frontend raises a BaseException between two calls, here after a prune, too."""
    expected, clone = video(comfy, model, Setup()), applied(model, ForcedPolicy({2: [DEAD], 4: [OTHERS]}))
    seen = 0

    def press(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == call:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        video(comfy, clone, Setup(), callback=press)
    assert not tokentrim.is_patched(model) and torch.equal(video(comfy, model, Setup()), expected)
    assert torch.equal(video(comfy, clone, Setup()), masked(comfy, model, Setup(), {2: [DEAD], 4: [OTHERS]}, drop=True))


def test_lighter_frames_equal_biased_attention(comfy: Comfy, model: Any) -> None:
    """SoftPrune: of two finished frames the older one has half the weight, for every query."""
    setup, every = Setup(frames=3, block=1), dict.fromkeys(range(TOKENS), 0.5)
    ours = video(comfy, applied(model, SoftPrune(weight=0.5, keep=1)), setup)
    prunes = [Prune(2, [[token]]) for token in every]
    with source_of(comfy, model) as source, WeighedReference(source, prunes, {1}, weights=every):
        reference = video(comfy, model, setup)
    assert difference(ours, reference) <= TOLERANCE and difference(ours, video(comfy, model, setup)) > VISIBLE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(comfy: Comfy, dtype: torch.dtype) -> None:
    half = model_of(comfy, dtype)
    plain = video(comfy, half, Setup())
    assert half.model.get_dtype() is dtype and torch.equal(video(comfy, applied(half, ObservePolicy()), Setup()), plain)
    ours = video(comfy, applied(half, ForcedPolicy({4: [DEAD]})), Setup())
    assert difference(ours, plain) > VISIBLE and torch.equal(ours, masked(comfy, half, Setup(), {4: [DEAD]}, drop=True))


def test_an_ordinary_model_is_refused_in_words(comfy: Comfy, model: Any) -> None:
    plain = comfy.supported.WAN21_T2V({"image_model": "wan2.1", "model_type": "t2v", "dim": 128, "num_layers": 1})
    base = plain.get_model({}, device="meta")
    other = comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    with pytest.raises(tokentrim.UnsupportedModelError, match="no init_kv_caches"):
        applied(other, ObservePolicy())


def test_another_sampler_is_left_alone_and_says_so(comfy: Comfy, model: Any) -> None:
    """Euler keeps no finished frames: nothing can be pruned, and the user hears of it."""
    clone, noise = applied(model, ForcedPolicy({})), torch.randn(1, 16, 2, 8, 12)
    text = [[torch.randn(1, 8, 32), {}]]
    sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.5, 0.0])

    def run(one: Any) -> Tensor:
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                one, noise, 1.0, sampler, sigmas, text, text, torch.zeros_like(noise), disable_pbar=True, seed=1
            )

    with pytest.warns(tokentrim.TokenTrimWarning, match="recognised"):
        found = run(clone)
    assert torch.equal(found, run(model))
