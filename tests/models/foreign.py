"""Shared by the suites that run against foreign packages: stand-ins for modules, random weights.

This file and the suites are imported only in the subprocess of :mod:`test_foreign`, one foreign package each.
"""

from __future__ import annotations

import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import nn


class Stubs:
    """A finder that imports the named packages, and all below them, as modules whose attributes are empty classes."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Claim the named packages only."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """Return a stand-in."""
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class Stub(types.ModuleType):
    """A module of which any attribute can be imported and nothing can be used."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with noise: heads that start at zero would make every test vacuous."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = base + noise * fan_in**-0.5
    return module.eval().requires_grad_(False)
