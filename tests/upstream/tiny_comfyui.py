"""ComfyUI's own AR model, samplers and model patcher on a CPU, tiny, with random weights.

The checkout is ``$TOKENTRIM_UPSTREAM/ComfyUI``; what ComfyUI imports may lie in folders that $TOKENTRIM_COMFYUI lists,
joined as in PYTHONPATH. torchvision and torchaudio are empty stand-ins where they are not installed: nothing of the
model uses them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers.models.modeling_utils
import pytest
import torch
import transformers.models.t5.modeling_t5  # noqa: F401 - before torchvision is stubbed: transformers asks for it
from harness import NOT_CHECKED, checkout, randomise
from masked_reference import Source
from torch import Tensor

VARIABLE = "TOKENTRIM_COMFYUI"
PACK = Path(__file__).resolve().parents[2] / "examples" / "comfyui"
HEIGHT, WIDTH, LAYERS, DIM, TEXT = 8, 12, 2, 256, 32
TOKENS = HEIGHT * WIDTH // 4
STEPS = (1.0, 0.75, 0.5, 0.0)
"""Noise levels of a chunk: three denoising calls, then the clean one."""


@dataclass(frozen=True)
class Comfy:
    """Modules of an open checkout, and the node pack."""

    ar_model: Any
    sample: Any
    samplers: Any
    model_management: Any
    model_patcher: Any
    model_base: Any
    supported: Any
    pack: Any
    version: str


@contextmanager
def comfyui(torch_kernel: bool = False) -> Iterator[Comfy]:
    """Open the checkout, for a CPU; skips the test where what it imports is not installed.

    ComfyUI chooses the kernel: on a CPU its own, which goes through the keys in parts. Or, if asked, torch's.
    """
    assert diffusers
    folders = [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    missing = tuple(name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name) is None)
    with mock.patch.object(sys, "path", [*sys.path, *folders]), checkout("ComfyUI", stubs=missing) as folder:
        try:
            options = importlib.import_module("comfy.cli_args").args
            options.cpu, options.use_pytorch_cross_attention = True, torch_kernel
            names = "ldm.wan.ar_model sample samplers model_management model_patcher model_base supported_models"
            modules = [importlib.import_module(f"comfy.{name}") for name in names.split()]
        except ModuleNotFoundError as failure:
            if failure.name == "comfy.ldm.wan.ar_model":
                pytest.skip(f"{NOT_CHECKED} against the real ComfyUI: this checkout is older than its AR model")
            if str(failure.name).startswith("comfy."):
                raise
            pytest.skip(f"{NOT_CHECKED} against the real ComfyUI: it imports {failure.name}, which is not installed")
        version = importlib.import_module("comfyui_version").__version__
        with installed() as pack:
            assert folder in Path(modules[0].__file__).parents
            yield Comfy(*modules, pack, version)


@contextmanager
def installed() -> Iterator[Any]:
    """The node pack, imported as ComfyUI imports a folder of custom_nodes."""
    spec = importlib.util.spec_from_file_location("tokentrim_pack", PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"tokentrim_pack": pack}):
        spec.loader.exec_module(pack)
        yield pack


def model_of(comfy: Comfy, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL as a loader node makes it: the real BaseModel and ModelPatcher."""
    sizes = {"dim": DIM, "ffn_dim": 128, "freq_dim": 32, "text_dim": TEXT, "num_heads": 2, "num_layers": LAYERS}
    config = comfy.supported.WAN21_CausalAR_T2V({"image_model": "wan2.1", "model_type": "t2v", "dtype": dtype, **sizes})
    base = config.get_model({}, device="cpu")
    dtypes = [parameter.dtype for parameter in base.diffusion_model.parameters()]  # some layers stay in float32
    for parameter, own in zip(randomise(base.diffusion_model).parameters(), dtypes, strict=True):
        parameter.data = parameter.data.to(own)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=device)


@dataclass(frozen=True)
class Setup:
    """``block`` frames a chunk, ``frames`` in all, ``batch`` videos; ``image``: frames that are given."""

    frames: int = 12
    block: int = 2
    batch: int = 1
    image: int = 0
    steps: tuple[float, ...] = STEPS


def video(comfy: Comfy, model: Any, setup: Setup, seed: int = 9, callback: Callable[..., Any] | None = None) -> Tensor:
    """Latents ``[B, F, C, H, W]`` by the sampler ar_video, through ComfyUI's guider, as its sampler nodes call it."""
    torch.manual_seed(seed)
    noise = torch.randn(setup.batch, 16, setup.frames, HEIGHT, WIDTH)
    text = torch.randn(1, 8, TEXT, generator=torch.Generator().manual_seed(77))
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": setup.block})
    if setup.image:
        model = model.clone()
        given = torch.randn(1, 16, setup.image, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
        model.model_options.setdefault("transformer_options", {})["ar_config"] = {"initial_latent": given}
    with torch.inference_mode():
        latents = comfy.sample.sample_custom(
            model, noise, 1.0, sampler, torch.tensor(setup.steps), [[text, {}]], [[text, {}]],
            torch.zeros_like(noise), callback=callback, disable_pbar=True, seed=seed,
        )  # fmt: skip
    return latents.transpose(1, 2).clone()


@contextmanager
def source_of(comfy: Comfy, model: Any) -> Iterator[Source]:
    """What the -inf reference must know, while self attention is unpacked for it into heads."""
    diffusion, native = model.model.diffusion_model, comfy.ar_model.optimized_attention
    asked = SimpleNamespace(attention=lambda q, k, v: native(q.flatten(2), k.flatten(2), v.flatten(2), q.shape[2]))

    def through(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        found: Tensor = asked.attention(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v)))
        return found.flatten(2) if found.ndim == 4 else found

    def state(arguments: Any) -> Any:
        return arguments["transformer_options"]["ar_state"]

    with mock.patch.object(comfy.ar_model, "optimized_attention", through):
        yield Source(
            diffusion,
            asked,
            [block.self_attn.v for block in diffusion.blocks],
            start=lambda arguments: int(state(arguments)["start_frame"]),
            commits=lambda arguments: bool((arguments["timestep"] == 0).all()),
            tokens=TOKENS,
        )
