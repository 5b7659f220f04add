"""Forks of Self-Forcing around tiny random weights: what differs from ``tiny_self_forcing.py``, and nothing else."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from harness import checkout, plain_attention
from tiny_self_forcing import TOKENS, Repository, Setup, few_step_pipeline, tiny_model

FULL_SIZE = 1560
"""Tokens of a frame at upstream's resolution, which its files write as a literal."""


@contextmanager
def rescaled(
    function: types.FunctionType, scales: tuple[int, ...] = (1,), full: int = FULL_SIZE
) -> Iterator[None]:
    """Bring the literal numbers of tokens (``full``, times ``scales``) down to the tiny model's, for a while."""
    small = {sign * full * times: sign * TOKENS * times for times in scales for sign in (1, -1)}
    before, defaults = function.__code__, function.__defaults__
    function.__code__ = _with_constants(before, small)
    function.__defaults__ = defaults and tuple(_swapped(value, small) for value in defaults)
    try:
        yield
    finally:
        function.__code__, function.__defaults__ = before, defaults


def _swapped(value: Any, swap: Mapping[int, int]) -> Any:
    return swap.get(value, value) if isinstance(value, int) else value


def _with_constants(code: types.CodeType, swap: Mapping[int, int]) -> types.CodeType:
    def one(value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return _with_constants(value, swap)
        return _swapped(value, swap)

    return code.replace(co_consts=tuple(one(value) for value in code.co_consts))


# ------------------------------------------------------------------------------------------ Infinity-RoPE

def scenes_pipeline(repository: Repository, setup: Setup) -> Any:
    """Infinity-RoPE's ``CausalInferencePipeline``; seconds in prompts count as chunks."""
    pipeline = few_step_pipeline(repository, setup)
    for layer in pipeline.kv_cache1:
        layer["scene_cut"] = False
    pipeline.default_fps = 4 * setup.block
    return pipeline


@contextmanager
def small_scenes(repository: Repository) -> Iterator[None]:
    """The pipeline's flush of the cache between scenes, for frames of the tiny model's size."""
    loop = repository.few_step.CausalInferencePipeline.inference
    model = repository.attention.CausalWanModel
    with (
        rescaled(loop, (1, 2, 3)),
        mock.patch.object(model, "from_pretrained", classmethod(_tiny_anywhere)),
    ):
        yield


def _tiny_anywhere(cls: Any, folder: str, low_cpu_mem_usage: bool, device_map: Any, **options: Any) -> Any:
    return tiny_model(cls, folder, **options)


# ------------------------------------------------------------------------------------------ Reward-Forcing

def rewarded_pipeline(repository: Repository, setup: Setup) -> Any:
    """Reward-Forcing's pipeline; its configuration names a folder of weights."""
    options = setup.options()
    options.checkpoint_path = "nowhere"
    with mock.patch.object(Setup, "options", lambda _self: options):
        return few_step_pipeline(repository, setup)


# ------------------------------------------------------------------------------------------ Rolling Sink

def rolling_sink_pipeline(repository: Repository, setup: Setup) -> Any:
    """Rolling Sink's pipeline, with its second cache of the first frames."""
    pipeline = few_step_pipeline(repository, setup)
    for layer in pipeline.kv_cache1:
        layer.update({f"{name}_original": torch.zeros_like(layer[name]) for name in "kv"})
    return pipeline


# ------------------------------------------------------------------------------------------ Krea

@contextmanager
def krea() -> Iterator[Repository]:
    """Open Krea's checkout; its attention kernels need CUDA, its masked attention a compiler."""
    stubs = ("torchvision", "imageio", "lmdb", "decord", "cv2", "wandb", "dotenv")
    with checkout("realtime-video", stubs=stubs):
        few_step = importlib.import_module("pipeline.causal_inference")
        causal = importlib.import_module("wan.modules.causal_model")
        base = importlib.import_module("wan.modules.model")
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        forward = causal.CausalWanSelfAttention.forward
        with (
            mock.patch.object(torch.cuda, "current_device", lambda: "cpu"),
            mock.patch.multiple(base, FLASH_ATTN_2_AVAILABLE=True, flash_attention=plain_attention),
            mock.patch.object(causal, "attention", plain_attention),
            mock.patch.object(causal, "flex_attention", _eager(flex.flex_attention)),
            mock.patch.object(causal.CausalWanModel, "from_pretrained", classmethod(tiny_model)),
            rescaled(forward),
        ):
            yield Repository(few_step, None, causal)


def _eager(attention: Callable[..., Any]) -> Callable[..., Any]:
    def plain(**given: Any) -> Any:
        given.pop("kernel_options", None)
        return attention(**given)

    return plain


def krea_pipeline(repository: Repository, setup: Setup) -> Any:
    """Krea's ``CausalInferencePipeline`` with its own caches: the indices are plain numbers."""
    pipeline = few_step_pipeline(repository, setup)
    for layer in pipeline.kv_cache1:
        layer["global_end_index"] = layer["local_end_index"] = 0
    return pipeline
