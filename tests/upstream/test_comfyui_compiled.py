"""ComfyUI's own way to compile (the node TorchCompileModel) and the node pack on one clone, in either order."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch
from comparison import TOLERANCE, VISIBLE, difference
from forced import ForcedPolicy
from masked_reference import MaskedReference, Prune
from tiny_comfyui import Comfy, Setup, comfyui, model_of, source_of, video

pytestmark = [pytest.mark.upstream, pytest.mark.slow, pytest.mark.checks("comfyui-ar", "compiled")]
DEAD, SETUP = (0, 5, 11, 20), Setup(frames=8)


@pytest.fixture(scope="module")
def comfy() -> Iterator[Comfy]:
    with comfyui() as opened:
        yield opened
    torch.compiler.reset()


@pytest.mark.parametrize("first", ["compiled", "applied"])
def test_a_compiled_model_is_pruned(comfy: Comfy, first: str) -> None:
    """Graphs run eagerly, which changes no bit; that they are made at all, and made anew, is the compiler's part."""
    compiler = importlib.import_module("comfy_api.torch_helpers.torch_compile")
    applied = sys.modules["tokentrim_pack.tokentrim_comfyui.sampling"].applied
    model, policy = model_of(comfy), ForcedPolicy({2: [DEAD]})
    with source_of(comfy, model) as source, MaskedReference(source, [Prune(4, [DEAD])]):
        reference = video(comfy, model, SETUP)
    plain = video(comfy, model, SETUP)
    clone = applied(model, policy, "first-step") if first == "applied" else model.clone()
    compiler.set_torch_compile_wrapper(clone, backend="eager")
    clone = clone if first == "applied" else applied(clone, policy, "first-step")
    ours = video(comfy, clone, SETUP)
    assert difference(reference, plain) > VISIBLE and difference(ours, reference) <= TOLERANCE
    assert [report.triggers for _, report in clone.get_attachment("tokentrim").reports] == [1]
    assert torch.equal(video(comfy, model, SETUP), plain)
