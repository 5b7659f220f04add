"""Runs the real source of an upstream repository on a CPU: finds the checkout, imports it, and shims what needs CUDA.

Nothing in a checkout is edited. One repository is open at a time (several of them have packages of the same name);
leaving :func:`checkout` takes its modules out of the process again. What is special to a repository, its tiny model
above all, lives in a file of its own, ``tiny_<repository>.py``.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

VARIABLE = "TOKENTRIM_UPSTREAM"
NOT_CHECKED = "not checked"


def folder_of(name: str) -> Path:
    """Folder of the checkout ``name`` under $TOKENTRIM_UPSTREAM; skips the test, in these words, if it is absent."""
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{NOT_CHECKED} against the real {name}: {VARIABLE} is not set")
    folder = Path(root).resolve() / name
    if not folder.is_dir():
        pytest.skip(f"{NOT_CHECKED} against the real {name}: {VARIABLE} has no folder {name}")
    return folder


@contextmanager
def checkout(name: str, stubs: tuple[str, ...] = (), subfolder: str = "") -> Iterator[Path]:
    """Make the modules of a checkout importable; ``stubs`` names packages to import as empty stand-ins.

    Packages that look for one another when they are imported (transformers asks for torchvision) must be imported
    before this is entered.
    """
    folder = folder_of(name) / subfolder
    before = dict(sys.modules)
    own = {entry.stem for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".py"}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "path", [str(folder), *sys.path]))
        stack.enter_context(mock.patch.object(sys, "meta_path", [StubFinder(stubs), *sys.meta_path]))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        stack.callback(_restore_modules, before, own | set(stubs))
        _forget({module for module in before if module.partition(".")[0] in own | set(stubs)})
        yield folder


def _forget(names: set[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)


def _restore_modules(before: dict[str, types.ModuleType], roots: set[str]) -> None:
    """Take out what a checkout brought in, put back what it hid; other new modules stay."""
    _forget({name for name in sys.modules if name.partition(".")[0] in roots})
    sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] in roots})


class StubFinder:
    """Imports the named packages, and anything below them, as stand-ins whose attributes are empty classes."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Claim the named packages only."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """Return a module whose every public attribute exists."""
        return StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class StubModule(types.ModuleType):
    """A module of which any attribute can be imported and nothing can be used."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


# ------------------------------------------------------------------------------------------ tiny parts

def in_float32(function: Any) -> None:
    """Let a real attention function compute in float32: its CPU fallback casts to the default of ``dtype``."""
    wide = tuple(torch.float32 if value is torch.bfloat16 else value for value in function.__defaults__)
    function.__defaults__ = wide


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, q_lens: Any = None, k_lens: Any = None, **_: Any
) -> Tensor:
    """Attention over ``[B, length, heads, head_dim]``: stands in for a CUDA-only kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def randomise(module: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Fill every parameter with noise: output heads that start at zero would make all tests vacuous."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = base + scale * noise * fan_in**-0.5
    return module.eval().requires_grad_(False)


class TinyTextEncoder(nn.Module):
    """Prompt embeddings that depend on the prompt and on nothing else."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.shape = (length, width)

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        """Return ``{"prompt_embeds": [B, length, width]}``."""
        seeds = [sum(map(ord, prompt)) for prompt in text_prompts]
        rows = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return {"prompt_embeds": torch.stack(rows)}


class NoVae(nn.Module):
    """Decodes latents to themselves."""

    def decode_to_pixel(self, latent: Tensor, **_options: bool) -> Tensor:
        """Return the latents."""
        return latent


def noise_of(batch: int, frames: int, seed: int = 1, channels: int = 16, size: tuple[int, int] = (16, 20)) -> Tensor:
    """Starting noise ``[B, F, C, H, W]``."""
    return torch.randn(batch, frames, channels, *size, generator=torch.Generator().manual_seed(seed))
