"""The conformance kit on ComfyUI's own AR model, sampler and model patcher."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from tiny_comfyui import Comfy, Setup, comfyui, model_of, video
from torch import Tensor

from tokentrim_hooks.testing import AdapterConformance

pytestmark = pytest.mark.upstream


@pytest.fixture(scope="class", autouse=True)
def checkout_is_open(request: Any) -> Iterator[None]:
    """For all tests of a class; with torch's kernel, which the kit looks into."""
    with comfyui(torch_kernel=True) as request.cls.comfy:
        request.cls.adapter = sys.modules["tokentrim_pack.tokentrim_comfyui.adapter"].ComfyAR
        yield


class TestComfyUI(AdapterConformance):
    """Six chunks of two frames."""

    adapter_name = "comfyui-ar"  # its class is there when the checkout is open
    chunks, chunk_to_prune = 6, 3
    tokens = (0, 5, 11, 20)
    comfy: ClassVar[Comfy]

    def make_model(self) -> Any:
        return model_of(self.comfy)

    def run(self, model: Any, seed: int) -> Tensor:
        latents = video(self.comfy, model, Setup(frames=2 * self.chunks), seed)
        return model.model.process_latent_in(latents.transpose(1, 2)).transpose(1, 2)
