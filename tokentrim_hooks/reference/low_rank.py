"""Fine-tuning as low-rank differences to a base model: small files, and plain weights once they are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """Adds ``up @ down`` to a weight [out, in]; ``up`` [out, rank] begins at zero, so nothing changes at first."""

    def __init__(self, weight: Tensor, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns, generator=rng) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` [out, in] with the difference added."""
        return weight + self.up @ self.down


def adapt(model: nn.Module, rank: int, rng: torch.Generator) -> None:
    """Freeze ``model`` and let a difference of ``rank`` be trained for each of its linear layers, in place."""
    model.requires_grad_(False)
    for _, layer in _linear(model):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, rng))


def differences(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`adapt` made trainable: ``<layer>.up`` [out, rank] and ``<layer>.down`` [rank, in]."""
    found = {}
    for name, layer in _linear(model):
        difference: Any = layer.parametrizations["weight"][0]  # type: ignore[index]
        found[f"{name}.up"], found[f"{name}.down"] = difference.up.detach(), difference.down.detach()
    return found


@torch.no_grad()
def merge(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Add ``tensors``, as :func:`differences` returns them, to the weights of ``model``; no module is added."""
    layers = dict(_linear(model))
    names = {name.rpartition(".")[0] for name in tensors}
    if unknown := names - layers.keys():
        raise ValueError(
            f"differences for layers that the model does not have: {', '.join(sorted(unknown))}; "
            "use weights of this model"
        )
    for name in names:
        layers[name].weight += tensors[f"{name}.up"].float() @ tensors[f"{name}.down"].float()


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module
