"""Matrix-Game 2's real pipeline and causal model around tiny random weights: 80 tokens per frame, 3 layers.

Two of the layers have an action module: one cache of the mouse per site, made of the tokens' own features, and one of
the keyboard, made of nothing but what was typed. Latents are ``[B, C, F, H, W]`` here.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers.models.modeling_utils
import tiny_self_forcing
import torch
import transformers.models.t5.modeling_t5  # noqa: F401 - before torchvision is stubbed: transformers asks for it
from harness import checkout, noise_of, plain_attention, randomise
from masked_reference import MaskedReference, Source, fingerprints, masked_attention
from tiny_forks import rescaled
from tiny_self_forcing import HEADS, LAYERS, TOKENS, WIDTH, Repository, Setup, new_cache
from torch import Tensor

FULL_SIZE, GRID = 880, (8, 10)
PICTURE = (5, 1280)
"""Tokens and width of what is seen of the picture that begins the video."""
ACTION = {"heads_num": 1, "mouse_hidden_dim": 64, "keyboard_hidden_dim": 64}
"""Its rotary embedding is for heads of 64."""
MOUSE = {"mouse_dim_in": 2, "enable_mouse": True}
NO_MOUSE = {"enable_mouse": False}
"""As in the configuration "templerun"."""


@contextmanager
def matrix_game() -> Iterator[Repository]:
    """Open the checkout; FlashAttention, which action modules import by name, is SDPA."""
    assert diffusers
    stubs = ("cv2", "ftfy", "flash_attn")
    with checkout("Matrix-Game", stubs=stubs, subfolder="Matrix-Game-2") as folder:
        skip_init(folder, "wan", "wan.modules")
        few_step = importlib.import_module("pipeline.causal_inference")
        causal = importlib.import_module("wan.modules.causal_model")
        action = importlib.import_module("wan.modules.action_module")
        model = importlib.import_module("wan.modules.model")
        with (
            mock.patch.object(torch.cuda, "current_device", lambda: "cpu"),
            mock.patch.object(model, "flash_attention", plain_attention),
            mock.patch.object(causal, "attention", plain_attention),
            mock.patch.object(action, "flash_attn_func", plain_attention),
            mock.patch.object(few_step, "ZERO_VAE_CACHE", []),
            rescaled(action.ActionModule.forward, full=FULL_SIZE),
        ):
            yield Repository(few_step, action, causal)


def skip_init(folder: Path, *names: str) -> None:
    """Make packages importable without their ``__init__``, which import models that nobody runs here."""
    for name in names:
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]


def matrix_pipeline(repository: Repository, setup: Setup, mouse: bool = True) -> Any:
    """The real ``CausalInferencePipeline``, whose caches are made anew for every video."""
    generator = _generator(repository, setup, MOUSE if mouse else NO_MOUSE)
    options = SimpleNamespace(
        denoising_step_list=list(setup.steps), warp_denoising_step=True, context_noise=0,
        num_frame_per_block=setup.block,
    )  # fmt: skip
    pipeline = repository.few_step.CausalInferencePipeline(options, "cpu", generator, _decode)
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = LAYERS, TOKENS
    _make_small_caches(pipeline, setup)
    return pipeline


def _generator(repository: Repository, setup: Setup, mouse: dict[str, Any]) -> Any:
    model = repository.attention.CausalWanModel(
        model_type="i2v", dim=WIDTH, ffn_dim=128, freq_dim=32, num_heads=HEADS, num_layers=LAYERS,
        local_attn_size=setup.window, sink_size=setup.sink,
        action_config={
            "blocks": [0, 1], "hidden_size": 16, "img_hidden_size": WIDTH, "keyboard_dim_in": 4, **ACTION, **mouse
        },
    )  # fmt: skip
    for block in model.blocks:
        block.self_attn.max_attention_size = setup.window * TOKENS
    wrapper = importlib.import_module("utils.wan_wrapper").WanDiffusionWrapper
    with mock.patch.object(repository.attention.CausalWanModel, "from_config", lambda _folder: randomise(model)):
        return wrapper(model_config="tiny", is_causal=True)


def _decode(latents: Tensor, *cache: Any) -> tuple[Tensor, Any]:
    return latents, list(cache)


def _make_small_caches(pipeline: Any, setup: Setup) -> None:
    """Its methods write the full model's sizes as literals; these make the same caches for the tiny one."""

    pipeline._initialize_kv_cache = partial(_of_tokens, pipeline, setup)
    pipeline._initialize_kv_cache_mouse_and_keyboard = partial(_of_actions, pipeline, setup)
    pipeline._initialize_crossattn_cache = partial(_of_picture, pipeline)


def _of_tokens(pipeline: Any, setup: Setup, **_: Any) -> None:
    pipeline.kv_cache1 = new_cache(setup)


def _of_actions(pipeline: Any, setup: Setup, **_: Any) -> None:
    pipeline.kv_cache_mouse, pipeline.kv_cache_keyboard = (
        [_empty((rows, setup.window, 1, 64)) for _ in range(LAYERS)] for rows in (setup.batch * TOKENS, setup.batch)
    )


def _of_picture(pipeline: Any, **_: Any) -> None:
    pipeline.crossattn_cache = [{"k": None, "v": None, "is_init": False} for _ in range(LAYERS)]


def _empty(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        "k": torch.zeros(shape), "v": torch.zeros(shape),
        "global_end_index": torch.tensor([0]), "local_end_index": torch.tensor([0]),
    }  # fmt: skip


def generate(pipeline: Any, frames: int, mouse: bool = True, noise: Tensor | None = None) -> Tensor:
    """A video with noise for a picture and for what was typed and moved: ``[B, F, C, H, W]``, as ``noise`` is."""
    noise = (noise_of(1, frames) if noise is None else noise).transpose(1, 2)
    numbers = torch.Generator().manual_seed(7)
    given = {
        "cond_concat": torch.randn(1, 20, frames, *noise.shape[-2:], generator=numbers),
        "visual_context": torch.randn(1, *PICTURE, generator=numbers),
        "keyboard_cond": torch.randn(1, 4 * frames, 4, generator=numbers),
        "mouse_cond": torch.randn(1, 4 * frames, 2, generator=numbers),
    }
    mode = "universal" if mouse else "templerun"
    latents: Tensor = pipeline.inference(noise, given, return_latents=True, mode=mode)
    return latents.transpose(1, 2)


# ------------------------------------------------------------------------------------------ the reference

def source_of(repository: Repository, pipeline: Any) -> Source:
    """What the independent reference must know."""
    return replace(tiny_self_forcing.source_of(repository, pipeline), tokens=TOKENS)


@dataclass
class MouseReference(MaskedReference):
    """The same with -inf also at the dead tokens' keys in the caches of the mouse, told by the bits of V as well.

    ``action`` is the module of the action modules. ``sites`` collects, per attention over a mouse's cache, dead keys.
    """

    action: Any = None
    sites: list[int] = field(default_factory=list)

    def __enter__(self) -> MouseReference:
        super().__enter__()
        for block in self.source.generator.model.blocks:
            if getattr(block.action_model, "enable_mouse", False):
                self._undo.callback(block.action_model.t_qkv.register_forward_hook(self._remember_sites).remove)
        self._undo.enter_context(mock.patch.object(self.action, "flash_attn_func", self._over_actions))
        return self

    def _remember_sites(self, _module: Any, _args: Any, output: Tensor) -> None:
        values = output.chunk(3, dim=-1)[2]
        for i, frame in enumerate(fingerprints(values.unflatten(-1, (1, -1))).unbind(1)):
            self._known.append((self._frame + i, frame[None]))

    def _over_actions(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        marks = fingerprints(v)
        dead = torch.zeros_like(marks, dtype=torch.bool)
        for _, (fatal,) in self._active:
            dead |= torch.isin(marks, fatal)
        self.sites.append(int(dead.sum()))
        return masked_attention(q, k, v, dead) if self.sites[-1] else plain_attention(q, k, v)
